#pragma once
#include <pybind11/pybind11.h>

void bind_mlp_trainer(pybind11::module_& m);
