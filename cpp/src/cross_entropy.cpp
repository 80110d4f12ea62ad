#include "qlora_native/cross_entropy.h"

#include "backend.h"
#include "check.h"

namespace qlora_native {

void cross_entropy(const CrossEntropyArgs& args, const Stream& stream) {
  const std::int64_t rows = args.logits.rows, V = args.logits.cols;
  check(rows >= 0, "logits.rows", ">= 0", rows);
  check(V >= 1, "logits.cols", ">= 1", V);
  check_matrix(args.logits, rows, V, args.logits.dtype, "logits");
  check_pointer(args.labels, rows > 0, "labels");
  check_pointer(args.loss, rows > 0, "loss");
  check(std::isfinite(args.scale), "scale", "a finite value", args.scale);
  check(std::isfinite(args.softcap) && args.softcap >= 0.0f, "softcap", ">= 0", args.softcap);
  check(args.label_smoothing >= 0.0f && args.label_smoothing <= 1.0f, "label_smoothing", "a value in [0, 1]",
        args.label_smoothing);
  check(std::isfinite(args.z_loss) && args.z_loss >= 0.0f, "z_loss", ">= 0", args.z_loss);
  if (stream.device == Device::cpu) {
    std::int64_t count = 0, first = -1;
    for (std::int64_t row = rows; row-- > 0;) {
      const std::int64_t label = args.labels[row];
      if (label == args.ignore_index || (label >= 0 && label < V)) continue;
      ++count;
      first = row;
    }
    check(
        count == 0, "labels",
        [&] { return "0 ... " + std::to_string(V - 1) + " or " + std::to_string(args.ignore_index); },
        [&] {
          return std::to_string(count) + " others, the first " + std::to_string(args.labels[first]) + " at " +
                 std::to_string(first);
        });
  }
  backend_for(stream).cross_entropy(args, stream);
}

}  // namespace qlora_native
