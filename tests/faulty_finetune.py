"""finetune, on one rank with a fault in the middle of training: torchrun … faulty_finetune.py FAULT ARGUMENTS."""

import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kandinsky5.training import finetune, loop, state_folder

FAULTY = 1  # the rank


def main(fault: str, arguments: list[str]) -> int:
    take, train = loop._take_step, loop.train

    def faulty(run, loss):
        if run.step == 3:
            Path(f"at-step-3-{os.environ['RANK']}").touch()
        if run.step == 3 and os.environ["RANK"] == str(FAULTY):
            if fault == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if fault == "raises":
                raise ValueError("its fan has stopped")
        if run.step >= 3 and fault == "slow":
            time.sleep(0.5)
        return take(run, loss)

    def save_each_step(*given, **options):
        return train(*given, **options | {"log_every": 1, "save_seconds": 0})

    def killed_saving(path):
        if os.environ["RANK"] == str(FAULTY) and "000002" in path.parent.name:
            os.kill(os.getpid(), signal.SIGKILL)
        return digest(path)

    digest = state_folder.sha256
    if fault == "killed saving":
        state_folder.sha256 = killed_saving
    loop._take_step, finetune.train = faulty, save_each_step
    return finetune.main(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
