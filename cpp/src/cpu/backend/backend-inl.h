// All of the generic algorithms. A backend.cpp defines QLN_ISA, includes the primitives of its instruction set
// (primitives-inl.h lists them), and then this file once.
//
// Everything here is in the namespace of the instruction set, so that a profile shows which one runs, and in an unnamed
// one inside of it, because the linker must never hand a function that was compiled for one instruction set to another.
#pragma once

#include "backend.h"
#include "cpu/elementwise/elementwise-inl.h"
#include "cpu/loss/cross_entropy-inl.h"
#include "cpu/optimizer/optimizer-inl.h"
#include "cpu/product/linear-inl.h"
#include "cpu/quantize/quantize-inl.h"

namespace qlora_native::QLN_ISA {

static_assert(Primitives<Vectors>);

}  // namespace qlora_native::QLN_ISA
