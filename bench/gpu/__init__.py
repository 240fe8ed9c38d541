"""Verify and measure this library on a GPU, and write a report: ``python -m bench.gpu``.

==============  ======================================================================================================
``__main__``    the plan: what is done, in which order, and how much time each step has
``report``      collects results, writes them after each line, and says what went wrong
``card``        precisions, times of the device and of the host, and the stand-ins of a rehearsal
``networks``    ResNet-18, ResNet-50 and ViT-B/16, which need no other package
``verify``      ops and networks against float64; waits; captures
``measure``     ceilings, layers by path, networks, peers
``pool``        the processes that verify, and compile what is measured later
``tools``       the build, compute-sanitizer and ncu
``single``      one small call of an op, for the tools
``page``        tables of predicted and measured times for docs/gpu.md
==============  ======================================================================================================
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "helpers"))
