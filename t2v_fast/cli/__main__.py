"""``python -m t2v_fast.cli``."""

import sys

from . import main

sys.exit(main())
