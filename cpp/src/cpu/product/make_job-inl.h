// Makes a job over the rows of a quantized weight.
#pragma once

#include <memory>

#include "cpu/product/linear.h"
#include "cpu/quantize/quantized_rows-inl.h"

namespace qlora_native::QLN_ISA {
namespace {

// Makes a job of the class template kJob, over the rows of the part's weight in the order of the Dot ForRows.
template <class ForRows, template <class, class> class kJob, class Dot, class Args>
std::unique_ptr<Job> make_job(const Args& args, const WeightRows& part) {
  return with_rows<ForRows>(args.weight, part.weight, [&](const auto& rows) -> std::unique_ptr<Job> {
    return std::make_unique<kJob<Dot, std::remove_cvref_t<decltype(rows)>>>(rows, args, part);
  });
}

}  // namespace
}  // namespace qlora_native::QLN_ISA
