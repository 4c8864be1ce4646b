"""Faults that AddressSanitizer must find, for run_sanitizers.sh: with validate=False the caller vouches for the
indices, and these are wrong. Usage: planted_fault.py read|write|isas."""

import sys

import slkernels
import torch


def main(what: str) -> None:
    if what == "isas":
        print(*slkernels.build_info()["cpu_isas"])
        return
    # Small tensors, a fault just past the end: malloc places each in a red zone of its own.
    crow = torch.tensor([0, 1], dtype=torch.int32)
    col = torch.tensor([70], dtype=torch.int16)
    if what == "read":
        slkernels.gather_support(torch.ones(1, 64), crow, col, validate=False)
    else:
        slkernels.compose(torch.ones(1), crow, col, 64, validate=False)
    print("not found")


main(sys.argv[1])
