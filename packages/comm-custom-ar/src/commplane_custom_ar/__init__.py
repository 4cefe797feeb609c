# SPDX-License-Identifier: Apache-2.0
"""commplane's intra-node all-reduce backend. Importing this loads neither torch nor the native library."""

__version__ = "0.1.0"
