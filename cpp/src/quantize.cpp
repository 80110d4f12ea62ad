#include "qlora_native/quantize.h"

#include "backend.h"
#include "check.h"

namespace qlora_native {

void quantize(const QuantizeArgs& args, const Stream& stream) {
  check(args.elements >= 0, "elements", ">= 0", args.elements);
  check_bits(args.bits, "bits");
  check_blocksize(args.blocksize, "blocksize");
  check_pointer(args.weight, args.elements > 0, "weight");
  check_pointer(args.codes, args.elements > 0, "codes");
  check_pointer(args.absmax, args.elements > 0, "absmax");
  check_pointer(args.non_finite, true, "non_finite");
  check_code(args.code, args.bits, stream, "code");
  backend_for(stream).quantize(args, stream);
}

void quantize_absmax(const QuantizeAbsmaxArgs& args, const Stream& stream) {
  check(args.blocks >= 0, "blocks", ">= 0", args.blocks);
  check(args.nested_blocksize >= 1, "nested_blocksize", ">= 1", args.nested_blocksize);
  check_pointer(args.absmax, args.blocks > 0, "absmax");
  check_pointer(args.nested_code, true, "nested_code");
  check_pointer(args.codes, args.blocks > 0, "codes");
  check_pointer(args.nested_absmax, args.blocks > 0, "nested_absmax");
  check_pointer(args.offset, true, "offset");
  backend_for(stream).quantize_absmax(args, stream);
}

void dequantize(const DequantizeArgs& args, const Stream& stream) {
  check_weight(args.weight, stream);
  check_pointer(args.out, true, "out");
  backend_for(stream).dequantize(args, stream);
}

}  // namespace qlora_native
