"""The driver's side of generation: engine processes, one queue of questions, restarts, progress."""

import os
import shutil
import signal
import time
from multiprocessing import connection, get_context

from malaysian_sft.engine import engine_main
from malaysian_sft.generations import FIXED

LEAST_DISK = 4096  # bytes; with less an engine cannot even log


class Engine:
    """The driver's side of one engine slot: its process group, its pipe, what it is working on."""

    def __init__(self, slot, gpus):
        self.slot, self.gpus = slot, gpus
        self.process = self.pipe = self.life = self.output = None
        self.ready = False
        self.units = set()
        self.deaths = 0
        self.not_before = 0.0
        self.held = (
            False  # started for the next checkpoint, and told to wait with loading until this slot's memory is free
        )
        self.next = None  # an engine for the next checkpoint, started in the same slot while this one still writes

    @property
    def alive(self):
        return self.process is not None

    def start(self, output, config, held=False):
        """Start the process for one checkpoint; it reports ("ready",) when the model is loaded. held: it loads only
        after `release`."""
        context = get_context("spawn")
        self.pipe, theirs = context.Pipe()
        # nothing is ever sent: its end of file tells the engine that the driver died
        life, self.life = context.Pipe(duplex=False)
        self.log = output.directory / f"engine-{self.slot}.log"
        self.process = context.Process(target=engine_main, args=(theirs, life, str(self.log), self.gpus, config, held))
        self.process.start()
        theirs.close()
        life.close()
        self.output, self.ready, self.heard, self.units, self.held = output, False, time.monotonic(), set(), held
        doing = "starts and waits for memory" if held else "loads"
        print(f"{output.directory}: engine {self.slot} {doing}, log {self.log}", flush=True)

    def release(self):
        """Let an engine that was told to wait load its model."""
        if self.held:
            self.held, self.heard = False, time.monotonic()
            try:
                self.pipe.send("load")
            except OSError:
                pass  # it died while it waited, which the driver sees at its pipe

    def stop(self, grace=0.0):
        """End the engine and everything it started."""
        if self.process is None:
            return
        if grace:
            try:
                self.pipe.send(None)
            except OSError:
                grace = 0.0
            self.process.join(grace)
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            self.process.kill()  # it died, or has not made its group yet
        self.process.join()
        self.pipe.close()
        self.life.close()
        self.process = self.output = None

    def log_tail(self):
        try:
            lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return ""
        return "\n".join(lines[-12:])


class Scheduler:
    """Runs all rows over all engines; see the module docstring."""

    def __init__(self, args, plan, questions, outputs):
        self.args, self.plan, self.questions, self.outputs = args, plan, questions, outputs
        self.engines = [Engine(slot, gpus) for slot, gpus in enumerate(plan.gpus)]
        self.batch = max(1, plan.max_num_seqs // 8)
        self.capacity = plan.max_num_seqs + self.batch
        self.logged = time.monotonic()
        self.first_missing = {output.directory: output.missing for output in outputs}
        # until an engine that was started ahead of its turn fails; on a CPU two would fight over its cores
        self.ahead = plan.device == "cuda"

    def everyone(self):
        """Every engine that has a process, also those for the next checkpoint."""
        return [one for engine in self.engines for one in (engine, engine.next) if one is not None and one.alive]

    def run(self):
        """Until every sample of every row is on disk. Raises RuntimeError when an engine keeps failing or the disk is
        full."""
        # engines are ended by a signal, so Python's tracker of their semaphores would report them as leaked
        os.environ.setdefault("PYTHONWARNINGS", "ignore::UserWarning:multiprocessing.resource_tracker")
        try:
            while any(output.missing for output in self.outputs):
                self.assign()
                self.dispatch()
                self.collect()
                self.watch()
                self.progress()
            for engine in self.everyone():
                engine.stop(grace=10.0)
        finally:
            for engine in self.everyone():
                engine.stop()

    def is_ahead(self, engine):
        return any(engine is other.next for other in self.engines)

    def assign(self):
        """Give every free slot to the first row with unclaimed work; a slot that only waits moves on, one that finishes
        prepares to."""
        row = next((output for output in self.outputs if output.queue), None)
        for slot, engine in enumerate(self.engines):
            following = engine.next
            if following and not (following.alive and (following.units or following.output.queue)):
                following.stop()  # it failed, or others have taken its row's last questions
                following = engine.next = None
            if row is None and following is None:
                continue
            finished = engine.alive and engine.ready and engine.output is not row and not engine.output.queue
            if finished and engine.units:
                if following is None and self.ahead and self.needed(row):
                    engine.next = type(engine)(engine.slot, engine.gpus)
                    engine.next.start(row, self.engine_config(row), held=not self.room_for_two())
                continue
            if finished:
                if following and not (following.held or following.ready):
                    continue  # it loads beside this one; memory freed meanwhile would upset vLLM's measurement
                engine.stop(grace=10.0)
                engine.deaths = 0
            if engine.alive:
                continue
            if following and (finished or following.output is row):
                self.engines[slot], engine.next = following, None
                following.release()
            elif row and time.monotonic() >= engine.not_before and self.needed(row):
                engine.start(row, self.engine_config(row))

    def needed(self, row):
        """Whether one more engine has something to do: no more engines than there are questions for."""
        return sum(other.output is row for other in self.everyone()) < len(row.queue)

    def room_for_two(self):
        """Whether a second engine fits on the GPUs of a slot; the tenth left: contexts and CUDA graphs, which vLLM does
        not count."""
        return 2 * self.args.gpu_memory_utilization <= 0.9

    def engine_config(self, output):
        """Everything an engine needs, as plain values."""
        args, wanted = self.args, output.wanted
        return {
            "model": output.job.model,
            "adapter": output.job.adapter,
            "serve_lora": args.serve_lora,
            "device": self.plan.device,
            "engines": len(self.engines),
            "tensor_parallel": self.plan.tensor_parallel,
            "max_num_seqs": self.plan.max_num_seqs,
            "enforce_eager": self.plan.enforce_eager,
            "gpu_memory_utilization": args.gpu_memory_utilization,
            "max_model_len": args.max_model_len,
            "questions": self.questions,
            **{name: wanted[name] for name in FIXED if name in wanted},
        }

    def dispatch(self):
        """Top up the engines with small batches, each with its fair share of what is left."""
        for engine in self.everyone():
            if not engine.ready:
                continue
            output = engine.output
            team = [other for other in self.everyone() if other.output is output and not other.held]
            left = len(output.queue) + sum(len(other.units) for other in team)
            target = min(self.capacity, -(-left // len(team)))
            room = target - len(engine.units)
            if room <= 0 or (room < self.batch and engine.units and len(output.queue) > room):
                continue
            units = [output.queue.popleft() for _ in range(min(room, len(output.queue)))]
            if units:
                engine.units.update(units)
                engine.heard = time.monotonic()
                try:
                    engine.pipe.send(units)
                except OSError:
                    self.died(engine, "its process is gone")

    def collect(self):
        """Write what came back."""
        pipes = {engine.pipe: engine for engine in self.everyone()}
        if not pipes:
            time.sleep(0.2)
            return
        for pipe in connection.wait(list(pipes), timeout=0.5):
            engine = pipes[pipe]
            try:
                message = pipe.recv()
            except (EOFError, OSError):
                self.died(engine, "its process is gone")
                continue
            engine.heard = time.monotonic()
            if message[0] == "ready":
                engine.ready = True
                engine.output.started = engine.output.started or time.monotonic()
                print(f"{engine.output.directory}: engine {engine.slot} is ready after {message[1]:.0f} s", flush=True)
            elif message[0] == "records":
                engine.output.append(message[1])
                engine.units.difference_update((record["index"], record["sample"]) for record in message[1])
            elif message[0] == "refused" and not self.is_ahead(engine):
                raise ValueError(message[1])
            elif message[0] == "refused":  # perhaps only because another model is in memory too: its turn decides
                self.died(engine, message[1].splitlines()[0])
            elif message[0] == "failed":
                self.died(engine, message[1])

    def watch(self):
        """Notice engines that are silent for too long."""
        for engine in self.everyone():
            if engine.held:
                continue
            silent = time.monotonic() - engine.heard
            limit = self.args.hang_timeout if engine.ready else self.args.start_timeout
            if silent > limit and (engine.units or not engine.ready):
                self.died(
                    engine,
                    f"it has been silent for {silent:.0f} s"
                    f" ({'--hang_timeout' if engine.ready else '--start_timeout'})",
                )

    def died(self, engine, why):
        """Give an engine's questions back and plan its restart. Raises RuntimeError once its restarts are used up."""
        output, tail = engine.output, engine.log_tail()
        output.queue.extendleft(sorted(engine.units, reverse=True))
        engine.units = set()
        if self.is_ahead(engine):
            engine.stop()
            # assign forgets it; its row gets an engine when the slot is free, and that one's restarts are counted
            self.ahead = False
            print(
                f"{output.directory}: engine {engine.slot}, started ahead of its turn, failed ({why}); trying again in"
                " turn",
                flush=True,
            )
            return
        engine.stop()
        engine.deaths += 1
        safe = f"{output.total - output.missing} of {output.total} samples are safe"
        free = shutil.disk_usage(output.directory).free
        if free < LEAST_DISK:
            raise RuntimeError(
                f"no space left on the disk of {output.directory}; {safe}; make room and run the same command again"
            )
        if engine.deaths > self.args.restarts:
            raise RuntimeError(
                f"engine {engine.slot} failed {engine.deaths} times on {output.job.name}, last: {why}\n{tail}\n"
                f"{safe}; the log is {engine.log}; the same command continues"
            )
        pause = self.args.restart_backoff * 2 ** (engine.deaths - 1)
        engine.not_before = time.monotonic() + pause
        again = f"restart {engine.deaths} of {self.args.restarts} in {pause:.0f} s"
        print(f"{output.directory}: engine {engine.slot} failed ({why}); {again}", flush=True)

    def progress(self):
        """A line a row now and then, and when the row is complete: samples, answers/s, tokens/s, time left."""
        now = time.monotonic()
        due = now - self.logged >= self.args.log_every
        if due:
            self.logged = now
        for output in self.outputs:
            if output.started is None or output.reported or (output.missing and not due):
                continue
            seconds = max(now - output.started, 1e-3)
            rate = (self.first_missing[output.directory] - output.missing) / seconds
            left = (
                f"in {seconds:.0f} s"
                if not output.missing
                else f"{output.missing / rate:.0f} s left"
                if rate
                else "no answer yet"
            )
            counts = f"{output.total - output.missing}/{output.total} samples"
            print(
                f"{output.directory}: {counts}, {rate:.2f} answers/s, {output.tokens / seconds:.0f} tokens/s, {left}",
                flush=True,
            )
            output.reported = not output.missing
