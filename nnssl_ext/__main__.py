"""``python -m nnssl_ext`` is the ``nnssl_ext`` command."""

import sys

from nnssl_ext.cli import main

sys.exit(main())
