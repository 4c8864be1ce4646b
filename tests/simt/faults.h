// A program of planted faults: kernels in two versions, of which the one with the fault must be reported and the other
// must not. tests/test_simt.py reads the tables of faults*.cu for the names and the messages to expect.
//
//   faults <name> planted    exit code 3 and the runtime's message, or 1 and "differs from the reference"
//   faults <name> sound      exit code 0
#pragma once

#include <cuda_runtime.h>

#include <cstdio>
#include <cstring>

#include "simt/runtime.h"
#include "slkernels/launch.cuh"

namespace faults {

struct Fault {
  const char* name;
  const char* message;        // a part of it
  bool (*run)(bool planted);  // whether the result is right
};

template <size_t N>
int main(int argc, char** argv, const Fault (&table)[N]) {
  if (argc == 3)
    for (const Fault& f : table)
      if (!std::strcmp(f.name, argv[1])) {
        if (f.run(!std::strcmp(argv[2], "planted"))) return 0;
        std::fprintf(stderr, "differs from the reference\n");
        return 1;
      }
  std::fprintf(stderr, "usage: %s <name> planted|sound\n", argv[0]);
  return 2;
}

}  // namespace faults
