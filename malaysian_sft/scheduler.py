"""The driver's side of generation: engine processes, one queue of questions, restarts, progress."""

import os
import re
import shutil
import signal
import time
from multiprocessing import connection, get_context

from malaysian_sft.engine import engine_main
from malaysian_sft.generations import FIXED

LEAST_DISK = 4096  # bytes; with less an engine cannot even log
LOG_READ = 1 << 18  # bytes of a log's end that are searched for an error
# a line of a traceback that names the error, after what vLLM's logger puts before it
ERROR_LINE = re.compile(r"(\b[A-Za-z_][\w.]*(?:Error|Exception)(?:: .*|$)|Fatal Python error: .*)")


class Engine:
    """The driver's side of one engine slot: its process group, its pipe, what it is working on."""

    def __init__(self, slot, gpus):
        self.slot, self.gpus = slot, gpus
        self.process = self.pipe = self.life = self.output = None
        self.ready = False
        self.units = set()
        self.deaths = 0
        self.last = None  # where and with what error it died last
        self.log_start = 0  # bytes of its log that are of processes before
        self.not_before = 0.0
        self.takes = True  # weights in place of those it has; until it failed to
        self.taking = False  # it does so for its present checkpoint

    @property
    def alive(self):
        return self.process is not None

    def start(self, output, config):
        """Start the process for one checkpoint; it reports ("ready",) when the model is loaded."""
        context = get_context("spawn")
        self.pipe, theirs = context.Pipe()
        # nothing is ever sent: its end of file tells the engine that the driver died
        life, self.life = context.Pipe(duplex=False)
        self.log = output.directory / f"engine-{self.slot}.log"
        self.log_start = self.log.stat().st_size if self.log.exists() else 0
        self.process = context.Process(target=engine_main, args=(theirs, life, str(self.log), self.gpus, config))
        self.process.start()
        theirs.close()
        life.close()
        self.load(output, "loads")

    def take(self, output, config):
        """Have the running process, which has nothing left to do, load another checkpoint's weights in place."""
        self.load(output, "loads weights in place")
        self.taking = True
        self.send("load", config)

    def load(self, output, doing):
        self.output, self.ready, self.heard, self.units, self.taking = output, False, time.monotonic(), set(), False
        print(f"{output.directory}: engine {self.slot} {doing}, log {self.log}", flush=True)

    def send(self, kind, content):
        """Say something to the process; whether it is there. If not, its pipe says so to the driver too."""
        try:
            self.pipe.send((kind, content))
        except OSError:
            return False
        return True

    def stop(self, grace=0.0):
        """End the engine and everything it started."""
        if self.process is None:
            return
        if grace and self.send("end", None):
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

    def last_error(self):
        """The error that this process's log ends with, the cause rather than what points at it; "" if with none."""
        try:
            with open(self.log, "rb") as file:
                file.seek(max(self.log_start, file.seek(0, os.SEEK_END) - LOG_READ))
                lines = file.read().decode(errors="replace").splitlines()
        except OSError:
            return ""
        if not any(ERROR_LINE.search(line) for line in lines[-12:]):
            return ""  # what was logged long before did not end it
        found = [match.group(1) for match in map(ERROR_LINE.search, lines) if match]
        return ([error for error in found if "root cause" not in error] or found)[-1].strip()[:300]


class Scheduler:
    """Runs all rows over all engines; see the module docstring."""

    def __init__(self, args, plan, questions, outputs):
        self.args, self.plan, self.questions, self.outputs = args, plan, questions, outputs
        self.engines = [Engine(slot, gpus) for slot, gpus in enumerate(plan.gpus)]
        self.batch = max(1, plan.max_num_seqs // 8)
        # what is written at once, and as much waiting: answers that end together leave no engine without
        self.capacity = 2 * plan.max_num_seqs
        self.logged = time.monotonic()
        self.first_missing = {output.directory: output.missing for output in outputs}

    def running(self):
        """Every engine that has a process."""
        return [engine for engine in self.engines if engine.alive]

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
            for engine in self.running():
                engine.stop(grace=10.0)
        finally:
            for engine in self.running():
                engine.stop()

    def assign(self):
        """Give every slot with nothing left to do to the first row with unclaimed questions: its engine loads the row's
        weights in place, or a new one starts."""
        row = next((output for output in self.outputs if output.queue), None)
        for engine in self.engines:
            if row is None or not self.needed(row):
                return
            if engine.alive:
                if engine.output is row or not engine.ready or engine.units or engine.output.queue:
                    continue
                engine.deaths = 0
                if engine.takes and engine.output.job.model == row.job.model:
                    engine.take(row, self.engine_config(row))
                    continue
                engine.stop(grace=10.0)
            if time.monotonic() >= engine.not_before:
                engine.start(row, self.engine_config(row))

    def needed(self, row):
        """Whether one more engine has something to do: no more engines than there are questions for."""
        return sum(other.output is row for other in self.running()) < len(row.queue)

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
        for engine in self.running():
            if not engine.ready:
                continue
            output = engine.output
            team = [other for other in self.running() if other.output is output]
            left = len(output.queue) + sum(len(other.units) for other in team)
            target = min(self.capacity, -(-left // len(team)))
            room = target - len(engine.units)
            if room <= 0 or (room < self.batch and engine.units and len(output.queue) > room):
                continue
            units = [output.queue.popleft() for _ in range(min(room, len(output.queue)))]
            if units:
                engine.units.update(units)
                engine.heard = time.monotonic()
                if not engine.send("units", units):
                    self.died(engine, "its process is gone")

    def collect(self):
        """Write what came back."""
        pipes = {engine.pipe: engine for engine in self.running()}
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
            elif message[0] == "refused":
                raise ValueError(message[1])
            elif message[0] == "other":  # of another kind than its checkpoints before: `assign` starts a new one
                engine.stop(grace=10.0)
            elif message[0] == "failed":
                self.died(engine, message[1])

    def watch(self):
        """Notice engines that are silent for too long."""
        for engine in self.running():
            silent = time.monotonic() - engine.heard
            limit = self.args.hang_timeout if engine.ready else self.args.start_timeout
            if silent > limit and (engine.units or not engine.ready):
                self.died(
                    engine,
                    f"it has been silent for {silent:.0f} s"
                    f" ({'--hang_timeout' if engine.ready else '--start_timeout'})",
                )

    def died(self, engine, why):
        """Give an engine's questions back and plan its restart. Raises RuntimeError once its restarts are used up, or
        where the same error comes twice while nothing was answered."""
        output, tail, error = engine.output, engine.log_tail(), engine.last_error()
        output.queue.extendleft(sorted(engine.units, reverse=True))
        engine.units = set()
        if engine.taking and not engine.ready:
            engine.takes = False
            engine.stop()
            what = f"engine {engine.slot} could not load weights in place ({why}); a new one starts"
            print(f"{output.directory}: {what}", flush=True)
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
        # numbers differ: of processes, of bytes that are free
        before, engine.last = engine.last, (output.directory, re.sub(r"\d+", "0", error))
        if error and before == engine.last and output.missing == self.first_missing[output.directory]:
            raise RuntimeError(
                f"engine {engine.slot} failed twice on {output.job.name} with the same error and answered nothing:"
                f" {error}; {safe}; the log is {engine.log}; mend that, and the same command continues"
            )
        why = f"{why}: {error}" if error else why
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
