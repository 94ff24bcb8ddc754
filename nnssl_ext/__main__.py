"""Run the ``nnssl_ext`` command as ``python -m nnssl_ext``."""

import sys

from nnssl_ext.cli import main

sys.exit(main())
