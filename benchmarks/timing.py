"""What the benchmarks share: clocks, steps that take turns, medians with intervals, and memory.

Everything that only a CUDA device runs is here, too.
"""

import functools
import multiprocessing
import shutil
import subprocess
import time
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import trange


WARM_UP = 3  # runs of a step before one counts


class HostClock:
    """Seconds from the start of a step until the host and the device are done with it."""

    def __init__(self, device):
        self.device, self.host_seconds = device, [None, None]

    def warm_up(self, *steps):
        """Run each step as often as it takes to load, compile and allocate all it needs."""
        for step in steps:
            for _ in range(WARM_UP):
                step()
        synchronize(self.device)

    def __call__(self, step):
        synchronize(self.device)
        start = time.perf_counter()
        step()
        synchronize(self.device)
        return time.perf_counter() - start


class DeviceClock:
    """Seconds for which a step keeps a CUDA device busy, with nothing of its data in the L2 cache.

    The device sleeps while the host queues the whole step: it never waits for the host. How long the host takes is in
    `host_seconds`, one entry for each step of the last warm-up.
    """

    LONGEST_SLEEP = 0.05  # seconds

    def __init__(self):
        self.cold = torch.zeros(2**26, device="cuda")  # 256 MiB, more than any L2 cache holds
        self.host_seconds, self.sleep = [], 0
        self.cycles = 10**8
        self(lambda: torch.cuda._sleep(self.cycles))  # clocks rise under load
        self.cycles /= self(lambda: torch.cuda._sleep(self.cycles))  # of a second

    def warm_up(self, *steps):
        """Run each step as often as it takes to load, compile and allocate all it needs."""
        self.host_seconds = []
        for step in steps:
            for _ in range(WARM_UP):
                torch.cuda.synchronize()
                start = time.perf_counter()
                step()
                seconds = time.perf_counter() - start
            self.host_seconds.append(seconds)
        self.sleep = int(self.cycles * min(2 * max(self.host_seconds) + 1e-4, self.LONGEST_SLEEP))

    def __call__(self, step):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        self.cold.sum()  # not zero_(): the step would wait until what that leaves in the cache is written
        if self.sleep:
            torch.cuda._sleep(self.sleep)
        start.record()
        step()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3


@functools.cache
def make_clock(device):
    """The clock for single kernels: what the device is busy for, or on a CPU what the host takes."""
    return DeviceClock() if device == "cuda" else HostClock(device)


def synchronize(device):
    """Wait until all processes, and the device, are done."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    if device == "cuda":
        torch.cuda.synchronize()


def take_turns(first, second, pairs, clock, description="Pairs"):
    """Seconds of two kinds of steps that take turns, ABBA, each of shape `(pairs,)`."""
    seconds = ([], [])
    clock.warm_up(first, second)
    for index in trange(pairs, desc=description, disable=None):
        for which in (0, 1) if index % 2 else (1, 0):
            seconds[which].append(clock((first, second)[which]))
    return [torch.tensor(values, dtype=torch.float64) for values in seconds]


def median_with_interval(values):
    """Median and its 95 % interval, from resampled rounds."""
    generator = np.random.default_rng(0)
    medians = np.median(generator.choice(values, (5000, len(values))), axis=1)
    return [float(np.median(values)), *map(float, np.percentile(medians, [2.5, 97.5]))]


def copy_bandwidth(device, size=2**30):
    """Bytes per second of a copy of `size` bytes from the device to itself: those it reads and those it writes."""
    source = torch.rand(size // 4, device=device)
    target = torch.empty_like(source)
    clock = make_clock(device)

    def copy():
        target.copy_(source)

    clock.warm_up(copy)
    return 2 * source.nbytes / float(np.median([clock(copy) for _ in range(20)]))


def allocated_bytes(device):
    """Bytes of the tensors on the device; 0 on a CPU, where nobody counts."""
    return torch.cuda.memory_allocated() if device == "cuda" else 0


def measure_peak(device, step, before):
    """Bytes of the device that runs of `step` take at most, those that were allocated `before` not among them."""
    if device != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    for _ in range(WARM_UP):
        step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def describe_device(device):
    """What sets one device of a kind apart from another, and the versions below PyTorch."""
    if device != "cuda":
        return {}
    properties = torch.cuda.get_device_properties(0)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True).stdout.strip() if shutil.which(query[0]) else None
    return {
        "name": properties.name,
        "capability": [properties.major, properties.minor],
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "cache_bytes": properties.L2_cache_size,
        "driver": driver,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nccl": list(torch.cuda.nccl.version()),
        "triton": metadata.version("triton"),
    }


def profile(device, step, count=10):
    """The kernels of a step that take longest: `[name, calls, microseconds]` of each, and the sum of all."""
    kind = torch.profiler.ProfilerActivity.CUDA if device == "cuda" else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[kind]) as found:
        step()
        synchronize(device)
    time_of = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    rows = [[event.key[:120], event.count, getattr(event, time_of)] for event in found.key_averages()]
    rows = sorted((row for row in rows if row[2] > 0), key=lambda row: -row[2])
    return {"microseconds": sum(row[2] for row in rows), "kernels": rows[:count]}


def capture(run):
    """`run` as one CUDA graph: a function that replays it, on inputs that stay where they are."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # what is made on first use must not become a part of the graph
        for _ in range(WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run()

    def replay():
        graph.replay()
        return output

    return replay


def peak_memory(device, run, *arguments):
    """Bytes that `run(*arguments)` needs at most in a new process: of the device, or of the process on a CPU."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak_memory, (device, run, arguments))


def _peak_memory(device, run, arguments):
    torch.set_num_threads(1)
    run(*arguments)
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    # Not ru_maxrss: that begins with what the process that started this one held.
    status = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    (peak,) = (line.split()[1] for line in status if line.startswith("VmHWM"))
    return 1024 * int(peak)
