"""NABLA's attention on GPUs, compiled without one: shared memory, registers and spills of its kernels.

    python benchmarks/without_gpu.py [sm_90 …] > benchmarks/results/without_gpu.md

Inductor lowers flex_attention as the package calls it, and Triton and ptxas compile it for each GPU: all that a first
call does there but loading and running. Tensors are fake, and PyTorch is told of a GPU that is not there. So these are
facts about the machine code of one version of PyTorch and Triton, and no times. Some minutes per GPU; needs PyTorch's
CUDA build, on Linux, and gcc.
"""

import copy
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch

from kandinsky5.runtime import kernels

GPUS = {  # name, multiprocessors, threads of one, KB of shared memory that a block of threads may have
    "sm_75": ("T4", 40, 1024, 64),
    "sm_80": ("A100", 108, 2048, 163),
    "sm_86": ("RTX 3090", 82, 1536, 99),
    "sm_89": ("RTX 4090", 128, 1536, 99),
    "sm_90": ("H100", 132, 2048, 227),
    "sm_100": ("B200", 148, 2048, 227),
    "sm_120": ("RTX 5090", 170, 1536, 99),
}
RUNTIME = """\
int cudaGetDevice(int *x) { return *x = 0; }
int cudaSetDevice(int x) { return 0; }
int cudaGetDeviceCount(int *x) { *x = 1; return 0; }
int cudaDeviceGetStreamPriorityRange(int *x, int *y) { return *x = *y = 0; }
int cudaStreamIsCapturing(void *s, int *x) { return *x = 0; }
int cudaEventCreateWithFlags(void **e, unsigned f) { *e = e; return 0; }
int cuDevicePrimaryCtxGetState(int d, unsigned *f, int *x) { *x = 1; return *f = 0; }
int cudaGetLastError(void) { return 0; }
int cudaStreamQuery(void *s) { return 0; }
int cudaStreamWaitEvent(void *s, void *e, unsigned f) { return 0; }
int cudaEventRecord(void *e, void *s) { return 0; }
int cudaEventQuery(void *e) { return 0; }
int cudaEventDestroy(void *e) { return 0; }
"""  # what device guards and autograd ask CUDA: there is one device, which has nothing to do
HEADS, TILES = {64: 28, 128: 32}, 744  # Lite's and Pro's; 47,616 tokens, 31×32×48
TRIED = {
    f"{warps} warps, {stages} stages": {"fwd_num_warps": warps, "fwd_num_stages": stages}
    for warps, stages in itertools.product((4, 8), (1, 2, 3))
}


def pretend(gpu: str) -> list:
    """Tell PyTorch of a GPU. Returns a list that gets each kernel that is compiled from now on: (name, kernel)."""
    name, processors, threads, shared = GPUS[gpu]
    number = int(gpu.removeprefix("sm_"))
    properties = SimpleNamespace(
        name=name, major=number // 10, minor=number % 10, multi_processor_count=processors, warp_size=32,
        regs_per_multiprocessor=2**16, max_threads_per_multi_processor=threads, max_threads_per_block=1024,
        shared_memory_per_block_optin=shared * 2**10, total_memory=80 * 10**9, L2_cache_size=40 * 2**20,
    )  # fmt: skip
    answers = {
        "is_available": True, "is_initialized": True, "device_count": 1, "current_device": 0, "_lazy_init": None,
        "get_device_properties": properties, "get_device_capability": divmod(number, 10), "_exchange_device": 0,
        "_maybe_exchange_device": 0, "is_current_stream_capturing": False, "set_rng_state": None,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
    }  # fmt: skip
    for function, answer in answers.items():
        setattr(torch.cuda, function, lambda *_, answer=answer, **__: answer)
    torch.accelerator.is_available = lambda: False  # no streams to trace

    import triton  # these and the following keep what they find in torch.cuda
    from torch._inductor import compile_fx, config
    from torch._inductor.fx_passes import joint_graph
    from torch._inductor.runtime import triton_helpers, triton_heuristics
    from torch._subclasses import fake_tensor

    fake_tensor.init_gpu_context = triton_helpers.set_driver_to_gpu = lambda *_: None
    target = triton.backends.compiler.GPUTarget("cuda", number, 32)
    triton.runtime.driver.set_active(SimpleNamespace(get_current_target=lambda: target))
    config.use_static_triton_launcher = config.joint_graph_constant_folding = False  # these two touch the device
    patterns = joint_graph.lazy_init
    joint_graph.lazy_init = lambda device=None: patterns(torch.device("cpu"))  # the same for all devices

    compiled: list = []
    compile_inner = compile_fx._compile_fx_inner

    def precompile(tuner, *_, **__):
        tuner._precompile_worker()
        compiled.extend((tuner.fn.__name__, result.kernel) for result in tuner.compile_results)

    def compile_only(graph, *arguments, **options):
        plain = copy.deepcopy(graph)
        result = compile_inner(graph, *arguments, **options)
        result.current_callable = lambda inputs: plain(*inputs)  # what fake tensors go through
        return result

    triton_heuristics.CachingAutotuner.precompile = precompile
    compile_fx._compile_fx_inner = compile_only
    return compiled


def measure(kernel) -> tuple[int, int, int]:
    """KB of shared memory, registers and bytes of spills per thread of a compiled kernel."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(kernel.asm["cubin"])
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = re.findall(r"REG:(\d+) STACK:(\d+)", text)[0]
    return round(kernel.metadata.shared / 2**10), int(registers), int(stack)


def compile_flex(compiled: list, dtype: torch.dtype, head_dim: int, trained: bool, **changes) -> list:
    """NABLA's kernels as `kernels.attend_through` has them compiled, with other options: forward, and of gradients."""
    torch._dynamo.reset()
    kernels._compiled_flex_attention.cache_clear()
    heads, start = HEADS[head_dim], len(compiled)
    with torch.set_grad_enabled(trained):
        shape = 1, TILES * 64, heads, head_dim
        q, k, v = (
            torch.empty(shape, device="cuda", dtype=dtype).transpose(1, 2).requires_grad_(trained) for _ in "qkv"
        )
        block_map = torch.empty(1, heads, TILES, TILES, dtype=torch.bool, device="cuda")
        block_mask = kernels.build_block_mask(block_map, backward=trained)
        shared = kernels.shared_memory(q.device)
        options = kernels.flex_options(head_dim, dtype.itemsize, shared, backward=trained) | changes
        out = kernels._compiled_flex_attention()(q, k, v, block_mask=block_mask, kernel_options=options)
        if trained:
            out.sum().backward()
    return [kernel for name, kernel in compiled[start:] if name.startswith("triton_tem")]


def compile_all(gpu: str) -> dict[str, list[list]]:
    """The rows of each table for one GPU."""
    compiled, limit = pretend(gpu), GPUS[gpu][3]
    card, old = f"{gpu}, {GPUS[gpu][0]}", gpu == "sm_75"  # for which the package compiles nothing: it shows why
    tables: dict[str, list[list]] = {"used": [], "tried": []}
    precisions = {"float16": torch.float16} if old else {"bfloat16": torch.bfloat16, "float32": torch.float32}
    with torch._subclasses.FakeTensorMode():
        for name, head_dim, trained in itertools.product(precisions, HEADS, (False,) if old else (False, True)):
            found = compile_flex(compiled, precisions[name], head_dim, trained)
            for what, kernel in zip(("training", "gradients") if trained else ("inference",), found, strict=True):
                how = kernel.metadata.num_warps, kernel.metadata.num_stages
                tables["used"].append([card, name, head_dim, what, *how, *measure(kernel), limit])
        for head_dim in () if old else HEADS:
            found = [compile_flex(compiled, torch.bfloat16, head_dim, False, **options) for options in TRIED.values()]
            sizes = [" / ".join(map(str, measure(kernel))) for (kernel,) in found]
            tables["tried"].append([card, head_dim, *sizes])
    return tables


TITLES = {
    "used": "With the options that the package gives",
    "tried": "With others, in bfloat16 for inference: KB of shared memory / registers / spilled bytes",
}
HEADERS = {
    "used": "GPU|precision|head dim|kernel|warps|stages|shared memory, KB|registers|spilled, bytes|limit, KB",
    "tried": "|".join(["GPU", "head dim", *TRIED]),
}


def main() -> None:
    if torch.version.cuda is None:
        print("without_gpu: this PyTorch has no CUDA: it needs the build of pip install torch", file=sys.stderr)
        sys.exit(2)
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(compile_all(sys.argv[2])))
        return
    tables: dict[str, list[list]] = {name: [] for name in TITLES}
    with tempfile.TemporaryDirectory() as folder:
        library = f"{folder}/cuda.so"
        build = ["gcc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", library, "-x", "c", "-"]
        subprocess.run(build, input=RUNTIME, text=True, check=True)
        settings = {"LD_PRELOAD": library, "TORCHINDUCTOR_CACHE_DIR": folder, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        for gpu in sys.argv[1:] or GPUS:
            again = [sys.executable, __file__, "--one", gpu]
            environment = os.environ | settings | {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
            answer = subprocess.run(again, env=environment, stdout=subprocess.PIPE, check=True).stdout
            for name, rows in json.loads(answer.splitlines()[-1]).items():
                tables[name] += rows
    import triton

    print("# NABLA's attention, compiled without a GPU\n")
    print(f"torch {torch.__version__}, Triton {triton.__version__}: `benchmarks/without_gpu.py`. Nothing ran on a GPU.")
    for name, rows in tables.items():
        header = HEADERS[name].split("|")
        print(f"\n## {TITLES[name]}\n")
        for row in (header, ["---"] * len(header), *rows):
            print("| " + " | ".join(map(str, row)) + " |")


if __name__ == "__main__":
    main()
