# SPDX-License-Identifier: Apache-2.0
"""``python -m spikenm_fx.cli``."""

from spikenm_fx.cli.app import main

if __name__ == "__main__":
    main()
