"""Microbenchmarks of slkernels against the dense library and the strongest peers: ``python -m slkernels.bench``."""
