// The names that Python uses for formats, rules and masters, as the enums of step.h.
#pragma once

#include <c10/core/ScalarType.h>
#include <pybind11/pybind11.h>

#include <string>

#include "step.h"

namespace fused_adamw {

inline Format format_of(at::ScalarType dtype) {
  switch (dtype) {
  case at::kFloat: return Format::f32;
  case at::kDouble: return Format::f64;
  case at::kBFloat16: return Format::bf16;
  case at::kHalf: return Format::f16;
  case at::kChar: return Format::i8;
  default: throw pybind11::type_error(std::string("fused_adamw has no format for ") + at::toString(dtype));
  }
}

inline Rule rule_of(const std::string& name) {
  if (name == "adam") return Rule::adam;
  if (name == "adam_amsgrad") return Rule::adam_amsgrad;
  if (name == "sgd") return Rule::sgd;
  if (name == "sgd_momentum") return Rule::sgd_momentum;
  if (name == "adam_cautious_decay") return Rule::adam_cautious_decay;
  if (name == "adam_cautious_update") return Rule::adam_cautious_update;
  if (name == "adabound") return Rule::adabound;
  if (name == "amsbound") return Rule::amsbound;
  if (name == "adam_no_first_moment") return Rule::adam_no_first_moment;
  throw pybind11::value_error("there is no rule '" + name + "'");
}

inline Master master_of(const std::string& name) {
  if (name == "none") return Master::none;
  if (name == "kahan") return Master::kahan;
  if (name == "split16") return Master::split16;
  if (name == "fp32") return Master::fp32;
  throw pybind11::value_error("there is no master '" + name + "'");
}

}  // namespace fused_adamw
