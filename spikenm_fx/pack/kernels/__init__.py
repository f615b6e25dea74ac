# SPDX-License-Identifier: Apache-2.0
"""What can run a packed weight: ``reference`` in plain torch, ``cpu`` in C++ kernels."""
