"""Runs the experts block's Gluon kernels on a CPU, because Triton's interpreter does not know Gluon and CI has no
Hopper GPU.

    with hopper_simulator.installed(seed, timing): moe_lora(...)    # in a process with TRITON_INTERPRET=1

The kernels' own Python source is executed with names like `tma` and `mbarrier` bound to this file's. What Hopper does
concurrently is concurrent here: every partition of every program is a thread, one of which runs at a time, chosen at
random; bulk copies, cp.async, tensor-core products and bulk stores happen later than they are issued. `timing` says
when: "early" at once, "late" only when somebody waits for them, or "random". Results that depend on it are a race: a
stage refilled before it was read, a store that reads what came after. Found and raised by name: deadlocks, a barrier
with more arrivals or bytes than it expects, addresses outside a tensor, tensor cores or bulk stores that read what
ordinary stores wrote without a fence between, results used before they were waited for, descriptors that the hardware
would refuse.

Not modelled: registers, layouts and swizzles (memory is as the kernel sees it), threads within a warpgroup (one program
order stands for all 128), whose fence it is (one counts for every partition of its program), and bf16: values are fp32,
so that a comparison can be exact, while sizes and alignments count two bytes a value. FP8 is rounded as it is.
"""

import contextlib
import dataclasses
import inspect
import random
import threading
import types
from unittest import mock

import torch
from triton import language as tl

from malaysian_sft import moe_autograd, moe_hopper, moe_hopper_fp8, moe_hopper_swiglu, moe_routing, moe_swiglu
from malaysian_sft.fp8 import FP8
from malaysian_sft.moe_routing import HOPPER
from malaysian_sft.moe_swiglu import nonzero

# a name may stand in several
ROOMS = (moe_routing, moe_swiglu, moe_hopper, moe_hopper_swiglu, moe_hopper_fp8, moe_autograd)


def width(dtype):
    """Bytes of a value: of bf16's, if it is not FP8's."""
    return 1 if dtype == FP8 else 2


class Race(AssertionError):
    """The kernel did something that is wrong on some schedule, if not on this one."""


class Stopped(Exception):
    """Ends the other threads of a simulation that has failed."""


# ----------------------------------------------------------------------------------------------------------------------
# Threads and time
# ----------------------------------------------------------------------------------------------------------------------


class Task:
    """One partition of one program: a thread, and the queues of what it issued that must happen in its order."""

    def __init__(self, function, program, warps):
        self.function, self.program, self.warps = function, program, warps
        self.turn = threading.Event()
        self.done, self.condition = False, None
        self.products, self.stores, self.copies = [], [], []


class Machine:
    """Runs tasks one at a time in a random order, with what they left under way in between."""

    def __init__(self, seed, timing):
        self.random, self.timing = random.Random(seed), timing
        self.tasks, self.error = [], None
        self.copies = []  # bulk loads under way, in any order
        self.current = None

    def start(self, function, program, warps):
        task = Task(function, program, warps)
        self.tasks.append(task)
        threading.Thread(target=self.body, args=(task,), daemon=True).start()
        return task

    def body(self, task):
        task.turn.wait()
        try:
            if self.error is None:
                with torch.no_grad():
                    task.function()
                if task.products or task.stores:
                    raise Race("a partition ended with bulk stores or products that it had not waited for")
        except Stopped:
            pass
        except BaseException as error:  # noqa: BLE001  handed to the thread that called run(), whatever it is
            self.error = self.error or error
        task.done = True
        self.pass_on()

    def pass_on(self):
        """Choose who runs next and wake it; work that is under way happens in between."""
        while True:
            live = [task for task in self.tasks if not task.done]
            if not live:
                self.finished.set()
                return
            if self.error is not None:
                ready = live
            else:
                if self.timing == "random":
                    while self.random.random() < 0.5 and self.advance():
                        pass
                ready = [task for task in live if task.condition is None or task.condition()]
            if ready:
                self.current = self.random.choice(ready)
                self.current.condition = None
                self.current.turn.set()
                return
            if not self.advance():
                self.error = Race(f"deadlock: all {len(live)} partitions wait")

    def advance(self):
        """Let one thing that is under way happen; False if there is nothing."""
        choices = [(self.copies, self.random.randrange(len(self.copies)))] if self.copies else []
        for task in self.tasks:
            choices += [(queue, 0) for queue in (task.products, task.stores, task.copies) if queue]
        if not choices:
            return False
        queue, index = self.random.choice(choices)
        try:
            queue.pop(index)()
        except BaseException as error:  # noqa: BLE001  it need not be the fault of the thread that runs now, which may have ended
            self.error = self.error or error
        return True

    def issue(self, queue, action):
        queue.append(action)
        if self.timing == "early":
            queue.pop(0)()

    def switch(self, condition=None):
        """Called by the running task: let others run, and come back once `condition` holds."""
        task = self.current
        task.condition, _ = condition, task.turn.clear()
        self.pass_on()
        task.turn.wait()
        if self.error is not None:
            raise Stopped

    def run(self, programs):
        """programs: (function, program, warps) of each. Returns when all have ended; raises what one of them raised."""
        self.finished = threading.Event()
        for program in programs:
            self.start(*program)
        self.pass_on()
        self.finished.wait()
        while self.error is None and self.advance():  # bulk loads that nobody waited for
            pass
        if self.error is not None:
            raise self.error


MACHINE = None  # the one that runs now


@dataclasses.dataclass
class Program:
    """What the partitions of one program share."""

    ids: tuple
    grid: tuple
    dirty: list = dataclasses.field(default_factory=list)  # per allocation, where ordinary stores await a fence


# ----------------------------------------------------------------------------------------------------------------------
# Values and global memory
# ----------------------------------------------------------------------------------------------------------------------


class Value(torch.Tensor):
    """A tensor in registers: torch's, except that `x += y` makes a new one and that split() halves the last
    dimension."""

    __iadd__ = torch.Tensor.__add__
    __isub__ = torch.Tensor.__sub__
    __imul__ = torch.Tensor.__mul__

    def split(self):
        return self[..., 0], self[..., 1]

    @property
    def type(self):
        return types.SimpleNamespace(layout=None)


def value(x, dtype=None):
    return torch.as_tensor(x, dtype=dtype).as_subclass(Value)


class Pointer:
    """Addresses within the storage of one tensor, counted in its elements."""

    def __init__(self, memory, offset):
        self.memory, self.offset = memory, offset  # the whole storage (n,), of FP8 its bits; int64 of any shape
        self.dtype = types.SimpleNamespace(element_ty=memory.dtype)

    @classmethod
    def to(cls, tensor):
        """The address of a tensor's first element."""
        dtype = torch.uint8 if tensor.dtype == FP8 else tensor.dtype
        memory = torch.empty(0, dtype=dtype).set_(tensor.untyped_storage())
        return cls(memory, value(tensor.storage_offset(), torch.int64))

    def __add__(self, other):
        return Pointer(self.memory, self.offset + other)

    __iadd__ = __add__

    def places(self, mask):
        """(offsets, mask) broadcast against each other, checked."""
        mask = value(True if mask is None else mask)
        offsets, mask = torch.broadcast_tensors(self.offset, mask)
        wrong = mask & ((offsets < 0) | (offsets >= self.memory.numel()))
        if wrong.any():
            raise Race(f"address {int(offsets[wrong].reshape(-1)[0])} outside a storage of {self.memory.numel()}")
        return offsets, mask

    def read(self, mask, other):
        offsets, mask = self.places(mask)
        found = self.memory[
            torch.where(mask, offsets, 0).as_subclass(torch.Tensor)
        ].clone()  # a single index gives a view
        found = found.view(FP8).float() if found.dtype == torch.uint8 else found
        return value(found if mask.all() else torch.where(mask, found, torch.tensor(other, dtype=found.dtype)))

    def write(self, values, mask):
        offsets, mask = self.places(mask)
        values = values.to(FP8).view(torch.uint8) if self.memory.dtype == torch.uint8 else values
        values = value(values, self.memory.dtype).expand(offsets.shape)
        self.memory[offsets[mask].as_subclass(torch.Tensor)] = values[mask].as_subclass(torch.Tensor)


class Descriptor:
    """What a bulk copy needs to know of a matrix, with the hardware's conditions on it."""

    def __init__(self, tensor, block_shape):
        assert tensor.dim() == 2 and tensor.stride(1) == 1, "a bulk copy's rows are contiguous"
        size = width(tensor.dtype)
        assert tensor.storage_offset() * size % 16 == 0, (
            f"the matrix begins at {tensor.storage_offset()} values, not at a 16-byte unit"
        )
        assert tensor.stride(0) * size % 16 == 0, f"rows are {tensor.stride(0)} values apart, not whole 16-byte units"
        assert all(0 < side <= 256 for side in block_shape), f"a box of {block_shape}"
        self.tensor, self.block_shape, self.layout = tensor.detach(), block_shape, None

    def box(self, coordinates):
        """(place in the tensor, place in the box) of the part of a box at `coordinates` that is inside."""
        inside, part = [], []
        for start, side, size in zip(map(int, coordinates), self.block_shape, self.tensor.shape, strict=True):
            if start < 0:
                raise Race(f"bulk copy at {start}")
            count = max(0, min(side, size - start))
            inside.append(slice(start, start + count))
            part.append(slice(0, count))
        return tuple(inside), tuple(part)


# ----------------------------------------------------------------------------------------------------------------------
# Shared memory and barriers
# ----------------------------------------------------------------------------------------------------------------------


class Shared:
    """A part of one allocation, of values of `size` bytes. `dirty`, of the same shape, is where ordinary stores have
    not been followed by a fence."""

    def __init__(self, memory, dirty, size):
        self.memory, self.dirty, self.size = memory, dirty, size
        self.layout = None

    def index(self, i):
        return Shared(self.memory[int(i)], self.dirty[int(i)], self.size)

    def slice(self, start, length):
        return Shared(self.memory[start : start + length], self.dirty[start : start + length], self.size)

    def permute(self, order):
        return Shared(self.memory.permute(order), self.dirty.permute(order), self.size)

    def _reinterpret(self, dtype, shape, layout):
        count, size = torch.Size(shape).numel(), width(dtype)
        assert count * size <= self.memory.numel() * self.size, f"{shape} does not fit into {tuple(self.memory.shape)}"
        return Shared(self.memory.view(-1)[:count].view(shape), self.dirty.view(-1)[:count].view(shape), size)

    def load(self, layout):
        MACHINE.switch()
        return value(self.memory.clone())

    def store(self, values):
        assert tuple(values.shape) == tuple(self.memory.shape), f"{tuple(values.shape)} into {tuple(self.memory.shape)}"
        MACHINE.switch()
        self.memory.copy_(values)
        self.dirty.fill_(True)

    def read_by_hardware(self, who):
        if self.dirty.any():
            raise Race(f"{who} read what ordinary stores wrote, without a fence between")
        return self.memory


class Barrier:
    """An mbarrier: a phase ends when `count` arrivals have come and all the bytes that were expected."""

    def start(self, count):
        self.count, self.pending, self.bytes, self.phase = count, count, 0, 0

    def arrive(self, count):
        if count > self.pending:
            raise Race(f"{count} arrivals at a barrier that awaits {self.pending} of {self.count}")
        self.pending -= count
        self.end_phase_if_complete()

    def transfer(self, count):
        self.bytes -= count
        self.end_phase_if_complete()

    def end_phase_if_complete(self):
        if self.pending == 0 and self.bytes == 0:
            self.pending, self.phase = self.count, self.phase ^ 1
        elif self.pending == 0 and self.bytes < 0:
            raise Race("more bytes than a barrier expects")


class Barriers:
    def __init__(self, count):
        self.barriers = [Barrier() for _ in range(count)]

    def index(self, i):
        return self.barriers[int(i)]


def only(barrier):
    """The barrier itself where an allocation of one is used without index()."""
    return barrier.barriers[0] if isinstance(barrier, Barriers) else barrier


class MBarrierLayout:
    pass


# ----------------------------------------------------------------------------------------------------------------------
# Gluon's names
# ----------------------------------------------------------------------------------------------------------------------


class Accumulator:
    """What products add to; only after a wait for all of them is there a value."""

    def __init__(self, start):
        self.sum, self.outstanding = start.clone(), 0

    def finished(self):
        if self.outstanding:
            raise Race("an accumulator was used before its products were waited for")
        return value(self.sum)

    def to(self, dtype):
        return self.finished().to(dtype)

    def __mul__(self, other):
        return self.finished() * other

    def reshape(self, shape):
        return self.finished().reshape(shape)


def warpgroup_mma(a, b, acc, is_async, use_acc=True):
    acc = acc if isinstance(acc, Accumulator) else Accumulator(acc)
    if not use_acc:
        assert not acc.outstanding
        acc = Accumulator(torch.zeros_like(acc.sum))
    acc.outstanding += 1

    def multiply():
        acc.sum = acc.sum + a.read_by_hardware("tensor cores") @ b.read_by_hardware("tensor cores")
        acc.outstanding -= 1

    MACHINE.issue(MACHINE.current.products, multiply)
    MACHINE.switch()
    return acc


def warpgroup_mma_wait(num_outstanding, deps):
    products = MACHINE.current.products
    while len(products) > num_outstanding:
        products.pop(0)()
    MACHINE.switch()
    return deps[0] if len(deps) == 1 else deps


def fence_async_shared():
    for dirty in MACHINE.current.program.dirty:
        dirty.fill_(False)


class tma:
    @staticmethod
    def async_copy_global_to_shared(desc, coordinates, bar, smem, pred=True):
        if not pred:
            return
        assert tuple(smem.memory.shape) == tuple(desc.block_shape), (
            f"a box of {desc.block_shape} into {tuple(smem.memory.shape)}"
        )
        inside, part = desc.box(coordinates)

        def copy():
            smem.memory.zero_()
            smem.memory[part] = desc.tensor[inside]
            smem.dirty.fill_(False)
            only(bar).transfer(smem.memory.numel() * smem.size)

        MACHINE.issue(MACHINE.copies, copy)
        MACHINE.switch()

    @staticmethod
    def async_copy_shared_to_global(desc, coordinates, smem):
        assert tuple(smem.memory.shape) == tuple(desc.block_shape), (
            f"a box of {desc.block_shape} from {tuple(smem.memory.shape)}"
        )
        inside, part = desc.box(coordinates)

        def copy():
            desc.tensor[inside] = smem.read_by_hardware("a bulk store")[part]

        MACHINE.issue(MACHINE.current.stores, copy)
        MACHINE.switch()

    @staticmethod
    def store_wait(pendings):
        stores = MACHINE.current.stores
        while len(stores) > pendings:
            stores.pop(0)()
        MACHINE.switch()


class async_copy:
    @staticmethod
    def async_copy_global_to_shared(smem, pointer, mask):
        def copy():
            smem.memory.copy_(pointer.read(mask, float("nan")))  # rows that are not there must not matter
            smem.dirty.fill_(True)

        MACHINE.issue(MACHINE.current.copies, copy)
        MACHINE.switch()

    @staticmethod
    def mbarrier_arrive(bar, increment_count):
        assert not increment_count
        threads = 32 * MACHINE.current.warps
        # behind the copies that this task issued
        MACHINE.issue(MACHINE.current.copies, lambda: only(bar).arrive(threads))
        MACHINE.switch()


class mbarrier:
    MBarrierLayout = MBarrierLayout

    @staticmethod
    def init(bar, count):
        only(bar).start(count)

    @staticmethod
    def expect(bar, bytes_per_cta, pred=True):
        if pred:
            only(bar).bytes += bytes_per_cta
            only(bar).arrive(1)
        MACHINE.switch()

    @staticmethod
    def arrive(bar, count):
        only(bar).arrive(count)
        MACHINE.switch()

    @staticmethod
    def wait(bar, phase):
        MACHINE.switch(lambda: only(bar).phase != int(phase) & 1)


class gl:
    float32 = bfloat16 = torch.float32
    int32, int64, float8e4nv = torch.int32, torch.int64, FP8
    constexpr = None
    static_range = range
    where, exp, abs = staticmethod(torch.where), staticmethod(torch.exp), staticmethod(torch.abs)

    @staticmethod
    def BlockedLayout(*_):
        pass

    SliceLayout = SwizzledSharedLayout = BlockedLayout

    class NVMMASharedLayout:
        @staticmethod
        def get_default_for(*_):
            pass

    @staticmethod
    def NVMMADistributedLayout(**_):
        pass

    @staticmethod
    def arange(start, end, layout):
        return value(torch.arange(start, end, dtype=torch.int32))

    @staticmethod
    def full(shape, fill, dtype, layout=None):
        return value(torch.full(shape, int(fill), dtype=dtype))

    @staticmethod
    def zeros(shape, dtype, layout):
        return value(torch.zeros(shape, dtype=dtype))

    @staticmethod
    def expand_dims(x, axis):
        return x.unsqueeze(axis)

    @staticmethod
    def sum(x, axis):
        return value(torch.sum(x, dim=axis))

    @staticmethod
    def max(x, axis):
        return value(torch.amax(x, dim=axis))

    @staticmethod
    def cdiv(a, b):
        return -(-a // b)

    @staticmethod
    def minimum(a, b):
        return a if a <= b else b

    @staticmethod
    def maximum(a, b):
        return a.clamp_min(b) if isinstance(a, torch.Tensor) and a.is_floating_point() else a if a >= b else b

    @staticmethod
    def div_rn(a, b):
        return value(torch.as_tensor(a, dtype=torch.float32) / torch.as_tensor(b, dtype=torch.float32))

    @staticmethod
    def convert_layout(x, layout):
        return x.finished() if isinstance(x, Accumulator) else value(x)

    @staticmethod
    def program_id(axis):
        return value(MACHINE.current.program.ids[axis], torch.int32)

    @staticmethod
    def num_programs(axis):
        return MACHINE.current.program.grid[axis]

    @staticmethod
    def num_warps():
        return MACHINE.current.warps

    @staticmethod
    def load(pointer, mask=None, other=0):
        MACHINE.switch()
        return pointer.read(mask, other)

    @staticmethod
    def store(pointer, values, mask=None):
        MACHINE.switch()
        pointer.write(values, mask)

    @staticmethod
    def atomic_add(pointer, add, sem):
        MACHINE.switch()
        before = pointer.read(None, 0)
        pointer.write(before + add, None)
        return before

    @staticmethod
    def allocate_shared_memory(dtype, shape, layout):
        if isinstance(layout, MBarrierLayout):
            return Barriers(shape[0])
        if dtype.is_floating_point:
            memory = torch.full(shape, float("nan"))
        else:
            memory = torch.full(shape, -7, dtype=dtype)
        dirty = torch.zeros(shape, dtype=torch.bool)
        MACHINE.current.program.dirty.append(dirty)
        return Shared(memory, dirty, width(dtype))

    @staticmethod
    def warp_specialize(partitions, warps, registers):
        """The first partition runs in the calling task, the others in tasks of their own."""
        program = MACHINE.current.program
        (first, arguments), *others = partitions
        tasks = [
            MACHINE.start(lambda f=f, a=a: f(*a), program, count) for (f, a), count in zip(others, warps, strict=True)
        ]
        first(*arguments)
        MACHINE.switch(lambda: all(task.done for task in tasks))


# ----------------------------------------------------------------------------------------------------------------------
# Launching
# ----------------------------------------------------------------------------------------------------------------------


def simulated_functions(mistake=None):
    """The Gluon functions of the experts block as plain Python functions that see this file's names instead of Gluon's.

    mistake: (name of a function, a part of its source, what to put there instead).
    """
    names = {name: value for room in ROOMS for name, value in vars(room).items()}
    names.update(
        gl=gl, tma=tma, mbarrier=mbarrier, async_copy=async_copy, fence_async_shared=fence_async_shared,
        warpgroup_mma=warpgroup_mma, warpgroup_mma_wait=warpgroup_mma_wait,
    )  # fmt: skip
    for name, jit in list(names.items()):
        if getattr(jit, "is_gluon", lambda: False)():
            names[name] = types.FunctionType(jit.fn.__code__, names)
        if isinstance(jit, tl.constexpr):
            names[name] = jit.value
    names["nonzero"] = types.FunctionType(nonzero.fn.__code__, {**names, "tl": gl})  # Triton's, which Gluon can call
    # PTX in the kernel; here everything is fp32
    names.update(hopper_sigmoid=torch.sigmoid, hopper_reciprocal=torch.reciprocal, hopper_rounded=lambda x: x)
    names.update(hopper_pinned=lambda x: x)  # what it does is the compiler's business
    if mistake is not None:
        name, right, wrong = mistake
        room = next(room for room in ROOMS if hasattr(room, name))
        source = inspect.getsource(getattr(room, name).fn)
        assert source.count(right) == 1, f"{right!r} is {source.count(right)} times in {name}"
        source = source[source.index("def ") :].replace(right, wrong)
        exec(compile(source, f"<{name} with a mistake>", "exec"), names)
    return names


class Kernel:
    """`kernel[grid](...)`: all programs of the grid at once."""

    def __init__(self, function, seed, timing):
        self.function, self.seed, self.timing, self.launches = function, seed, timing, 0

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.launch(grid, arguments, options)

    def launch(self, grid, arguments, options):
        global MACHINE
        warps = options.pop("num_warps")
        arguments = [Pointer.to(a) if isinstance(a, torch.Tensor) else a for a in arguments]
        self.launches += 1
        MACHINE = Machine(f"{self.seed} {self.launches}", self.timing)
        sizes = (*grid, 1)[:2]
        programs = [Program((i, j), sizes) for i in range(sizes[0]) for j in range(sizes[1])]
        MACHINE.run([(lambda: self.function(*arguments, **options), program, warps) for program in programs])
        MACHINE = None


KERNELS = "hopper_gemm_kernel", "hopper_fp8_gemm_kernel", "hopper_swiglu_backward_kernel"


@contextlib.contextmanager
def installed(seed, timing, multiprocessors=3, mistake=None, **tiles):
    """Within: moe_lora takes the Hopper path for CPU tensors in fp32. Yields the simulated kernels by name, which count
    their launches.

    seed: anything that prints; timing: "early", "late" or "random"; multiprocessors: how many programs
    hopper_gemm_kernel has. mistake: see simulated_functions. tiles: what to change of HOPPER's tile
    sizes.
    """
    names = simulated_functions(mistake)
    kernels = {name: Kernel(names[name], seed, timing) for name in KERNELS}
    sizes = dataclasses.replace(HOPPER, **tiles)
    on_hopper = moe_hopper.on_hopper
    replaced = {
        **kernels,
        "tiles_for": lambda device, dtype: sizes,
        "multiprocessors": lambda device: multiprocessors,
        "descriptor": Descriptor,
        "fp8_descriptor": lambda matrix, rows: Descriptor(matrix, [rows, 128]),
        "on_hopper": lambda x, p, tiles: on_hopper(types.SimpleNamespace(dtype=torch.bfloat16), p, tiles),
    }
    with contextlib.ExitStack() as patches:
        for room in ROOMS:
            here = {name: value for name, value in replaced.items() if hasattr(room, name)}
            if here:
                patches.enter_context(mock.patch.multiple(room, **here))
        yield kernels
