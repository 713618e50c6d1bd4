"""A SLURM cluster of two nodes on this machine: munged, slurmctld and two slurmd, all in one folder and on the loopback."""

import getpass
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd")
PATH = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])  # where Debian keeps the daemons
PATIENCE = 180  # seconds in which anything here happens, on a busy machine too


class Cluster:
    """What a user of the cluster can do. folder: of the jobs' output, and of all that the daemons keep."""

    def __init__(self, folder: Path, environment: Mapping[str, str]):
        self.folder, self._environment = folder, environment

    def command(self, *line: str, environment: Mapping[str, str] | None = None, cwd: Path | None = None) -> str:
        """What one of SLURM's commands prints."""
        done = subprocess.run(
            line, env=self._environment | dict(environment or {}), cwd=cwd, capture_output=True, text=True, timeout=PATIENCE
        )
        assert done.returncode == 0, f"{' '.join(line)}: {done.stderr}"
        return done.stdout

    def submit(self, *line: str, environment: Mapping[str, str], cwd: Path) -> str:
        """The id of a new job; `line` as after sbatch."""
        output = f"--output={self.folder}/%A_%a.out" if "--array" in line else f"--output={self.folder}/%j.out"
        return self.command("sbatch", "--parsable", output, *line, environment=environment, cwd=cwd).strip()

    def job(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says of it: JobState, Restarts, ExitCode, ..."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.command("scontrol", "--oneliner", "show", "job", job)))

    def wait_for_end(self, job: str) -> dict[str, str]:
        """Waits for the job's last end, over as many starts as it takes; what SLURM then says of it."""
        ended = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY", "BOOT_FAIL"}
        wait_until(lambda: self.job(job)["JobState"] in ended, lambda: f"the job to end: {self.job(job)}\n{self.said()}")
        return self.job(job)

    def said(self) -> str:
        """The end of all that jobs and daemons have printed, for the message of a test that fails."""
        files = sorted([*self.folder.glob("*.out"), *self.folder.glob("*.log"), *self.folder.glob("logs/*/*.log")])
        return "\n".join(f"--- {file}\n{file.read_text(errors='replace')[-2500:]}" for file in files)


def wait_until(happened: Callable[[], bool], what: Callable[[], str]) -> None:
    end = time.monotonic() + PATIENCE
    while not happened():
        assert time.monotonic() < end, f"waited {PATIENCE} s for {what()}"
        time.sleep(0.2)


@contextmanager
def running_cluster(folder: Path) -> Iterator[Cluster]:
    """The cluster, ready for jobs; its daemons are children of this process and end with the context.

    folder: a short path, since it holds a socket.
    """
    missing = [name for name in (*DAEMONS, "sbatch") if shutil.which(name, path=PATH) is None]
    assert not missing, f"{', '.join(missing)} not found; as root: apt-get install slurmctld slurmd slurm-client munge"
    environment = dict(os.environ) | {"PATH": PATH, "SLURM_CONF": str(folder / "slurm.conf")}
    cluster = Cluster(folder, environment)
    write_configuration(folder)
    socket_of_munge = folder / "munge.socket"
    files = {"key-file": folder / "munge.key", "pid-file": folder / "munge.pid", "seed-file": folder / "munge.seed"}
    files |= {"log-file": folder / "munged.log", "socket": socket_of_munge}
    with ExitStack() as daemons:

        def start(name: str, *line: str) -> None:
            daemons.enter_context(
                running_daemon([shutil.which(line[0], path=PATH), *line[1:]], folder / f"{name}.log", environment)
            )

        start("munge", "munged", "--foreground", "--force", *[f"--{option}={path}" for option, path in files.items()])
        wait_until(socket_of_munge.exists, lambda: f"munged: {cluster.said()}")
        start("slurmctld", "slurmctld", "-D", "-c")
        for node in ("node1", "node2"):
            start(node, "slurmd", "-D", "-N", node)

        def idle() -> bool:
            line = ["sinfo", "--noheader", "--Node", "--partition=normal", "--format=%T"]
            asked = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=PATIENCE)
            return asked.stdout.split() == ["idle", "idle"]

        wait_until(idle, lambda: f"two idle nodes: {cluster.said()}")
        yield cluster


@contextmanager
def running_daemon(line: list[str], log: Path, environment: Mapping[str, str]) -> Iterator[None]:
    with open(log, "wb") as output:
        process = subprocess.Popen(line, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def write_configuration(folder: Path) -> None:
    """slurm.conf, and a new key for munge."""
    (key := folder / "munge.key").write_bytes(os.urandom(128))
    key.chmod(0o400)
    host, user = socket.gethostname().partition(".")[0], getpass.getuser()
    ports = free_ports(3)
    for name in ("state", "node1", "node2"):
        (folder / name).mkdir()
    (folder / "slurm.conf").write_text(f"""\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
AuthType=auth/munge
# A requeued job waits until its old credential is void: two minutes by default.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmdSpoolDir={folder}/%n
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=30
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=8 State=UNKNOWN
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=8 State=UNKNOWN
PartitionName=normal Nodes=node1,node2 Default=YES State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=node1,node2 State=UP PriorityTier=2
""")


def free_ports(count: int) -> list[int]:
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
