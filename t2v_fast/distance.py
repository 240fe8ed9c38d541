"""The public name of :mod:`t2v_fast.analysis.distance`, which takes this module's place when it is imported."""

import sys

from .analysis import distance

sys.modules[__name__] = distance
