"""sample.py, on one rank with a fault in the middle of sampling: torchrun … faulty_sample.py FAULT ARGUMENTS."""

import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import sample
from kandinsky5 import cli

FAULTY = 1  # the rank


def main(fault: str, arguments: list[str]) -> int:
    from kandinsky5 import Pipeline, checkpoint

    predict, calls = Pipeline.predict, []

    def faulty(self, *given):
        calls.append(given)
        if len(calls) == 3:
            Path(f"at-step-3-{os.environ['RANK']}").touch()
        if len(calls) == 3 and os.environ["RANK"] == str(FAULTY):
            if fault == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if fault == "raises":
                raise ValueError("its fan has stopped")
            if fault == "bug":
                raise AssertionError("a mistake")
            if fault == "hangs":
                time.sleep(1000)
        return predict(self, *given)

    Pipeline.predict = faulty
    if fault == "killed early" and os.environ["RANK"] == str(FAULTY):
        time.sleep(2)  # the others wait for it by now
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "few GPUs":
        torch.cuda.device_count, torch.cuda.set_device = lambda: 1, lambda device: None
        torch.distributed.is_nccl_available = lambda: True
    if fault == "other checkpoint" and os.environ["RANK"] == str(FAULTY):
        real = checkpoint.fingerprint
        checkpoint.fingerprint = lambda *given: "0" + real(*given)[1:]
    return sample.main(arguments)


if __name__ == "__main__":
    cli.end(lambda: main(sys.argv[1], sys.argv[2:]))
