// Stands in for CUDA's header where the kernels are compiled for the host: see shim.h.
#pragma once
#include "shim.h"
