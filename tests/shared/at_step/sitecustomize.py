"""Do something before one training step, so that a test decides by step, not by time, when a run ends.

Put this folder on PYTHONPATH and set AT_STEP (`command_line.at_step` does): `AT_STEP="12 hold"` stops training before
step 12, counted from 0, until the process is killed; `AT_STEP="12 15"` sends signal 15 to the process there;
`AT_STEP="12 crawl 2"` takes a second for each step from there on while there are 2 ranks.
"""

import os
import signal
import time


def _install(number: int, action: str, ranks: str = "1") -> None:
    from effnet_fast.train.step import Step

    call = Step.__call__

    def at_step(self, images, labels, step, *rest):
        if action == "crawl":
            if step >= number and os.environ.get("WORLD_SIZE", "1") == ranks:
                time.sleep(1)
        elif step == number:
            while action == "hold":
                signal.pause()
            os.kill(os.getpid(), int(action))
        return call(self, images, labels, step, *rest)

    Step.__call__ = at_step


if "AT_STEP" in os.environ:
    _number, *_action = os.environ["AT_STEP"].split()
    _install(int(_number), *_action)
