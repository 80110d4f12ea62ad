#pragma once

namespace qlora_native {

// Makes the library run its tasks on torch's threads (ops.cpp), so that the two never fight over the cores.
void install_torch_thread_pool();

}  // namespace qlora_native
