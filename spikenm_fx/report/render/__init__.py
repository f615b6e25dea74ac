# SPDX-License-Identifier: Apache-2.0
"""A report as text, charts and a page."""
