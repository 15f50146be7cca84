"""A Slurm of one node for tests: its own daemons, ports, key and files, all gone when it is closed."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests import runs

SBIN = "/usr/sbin:/sbin"  # where Debian puts daemons; not on every PATH
MISSING = [
    name
    for name in ("munged", "slurmctld", "slurmd", "sbatch")
    if not shutil.which(name, path=f"{os.environ['PATH']}:{SBIN}")
]
WHY_NOT = f"{', '.join(MISSING)} not installed" if MISSING else "Slurm's daemons need root" if os.getuid() else ""

# Two partitions of the same node: a job of `urgent` preempts one of `common`, which goes back into the queue after its
# grace time. cred_expire is also how long a requeued job waits, two minutes by default. The node claims cores that it
# may lack, so that a test does not depend on how many there are.
CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmdParameters=config_overrides
ProctrackType=proctrack/pgid
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1,sched_min_interval=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=10
NodeName={host} NodeAddr=127.0.0.1 CPUs=8 State=UNKNOWN
PartitionName=common Nodes={host} Default=YES State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes={host} State=UP PriorityTier=2 PreemptMode=OFF
"""


class Slurm:
    """A running cluster. `folder` holds its configuration, state and logs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("state", "spool"):
            (folder / name).mkdir()
        host = socket.gethostname().partition(".")[0]
        ports = _free_ports(2)
        conf = CONF.format(host=host, folder=folder, controller_port=ports[0], node_port=ports[1])
        (folder / "slurm.conf").write_text(conf)
        key = folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}:{SBIN}"
        self.env = {**runs.environment(), "SLURM_CONF": str(folder / "slurm.conf"), "PATH": path}
        self._daemons: list[subprocess.Popen[bytes]] = []
        files = {name: folder / f"munge.{name}" for name in ("key", "socket", "pid", "seed", "log")}
        options = [f"--{name}{'' if name == 'socket' else '-file'}={file}" for name, file in files.items()]
        try:
            self._start("munged", "--foreground", "--force", *options)  # --force: a folder below /tmp is good enough
            self.wait_for(files["socket"].exists)
            self._start("slurmctld", "-D")
            self._start("slurmd", "-D", "-N", host)
            self.wait_for(lambda: "idle" in self.ask("sinfo", "--noheader", "--format=%T"))
        except BaseException:
            self.close()
            raise

    def ask(self, *words: str | Path) -> str:
        """What a command of Slurm says, of whatever kind."""
        done = subprocess.run([*map(str, words)], env=self.env, capture_output=True, text=True, cwd=self.folder)
        return done.stdout + done.stderr

    def submit(self, *words: str | Path) -> int:
        """The number of a job."""
        return int(self.ask("sbatch", "--parsable", *words))

    def state(self, job: int | str) -> str:
        """Such as PENDING or RUNNING; COMPLETED and the like for a while after its end."""
        return self.ask("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T").strip()

    def wait_for(self, condition: Callable[[], bool], seconds: float = 60) -> None:
        """Return once `condition()` holds; fail with all logs if it does not in time."""
        deadline = time.monotonic() + seconds
        while not condition():
            gone = [daemon.args[0] for daemon in self._daemons if daemon.poll() is not None]
            if gone or time.monotonic() > deadline:
                logs = "".join(f"\n== {path.name}\n{path.read_text()[-3000:]}" for path in self.folder.glob("*.log"))
                raise AssertionError(f"{gone} ended\n{logs}" if gone else f"not within {seconds} s\n{logs}")
            time.sleep(0.1)

    def close(self) -> None:
        """Kill the jobs, then stop the daemons."""
        if len(self._daemons) == 3:
            self.ask("scancel", "--user=root")
            self.wait_for(lambda: not self.ask("squeue", "--noheader").strip())
        for daemon in reversed(self._daemons):
            daemon.terminate()
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def _start(self, *words: str) -> None:
        with (self.folder / f"{words[0]}.log").open("wb") as log:
            self._daemons.append(subprocess.Popen(words, env=self.env, stdout=log, stderr=log, cwd=self.folder))


def _free_ports(n: int) -> list[int]:
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(n)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports
