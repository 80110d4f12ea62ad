// A shared library of qlora_native exports everything that is declared with QLN_API, and nothing else.
#pragma once

#define QLN_API [[gnu::visibility("default")]]
