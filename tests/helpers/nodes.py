"""Two nodes on one machine, each with a disk, a network interface and a name of its own.

Where the machine allows it, a node is a network, mount and host-name namespace, and the two are joined by a pair of
virtual interfaces. Elsewhere they are two loopback addresses, and each node's disk is the folder that its processes
are started in, so that files with the same relative path are separate too.
"""

import contextlib
import os
import shutil
import subprocess
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

INTERFACE = "node0"
TOOLS = ("ip", "mount", "nsenter", "unshare")


@dataclass(frozen=True)
class Node:
    """A node of a cluster.

    Attributes:
        name: the host name that its processes see, if it has a namespace.
        address: the address at which other nodes reach it.
        disk: the path of its disk for this process.
        root: the path of its disk for its own processes; the same on all nodes.
        holder: the process that keeps its namespaces; None if it has none.
    """

    name: str
    address: str
    disk: Path
    root: Path
    holder: int | None

    def describe(self) -> dict:
        """Return the settings with which zygote.py puts a process on this node."""
        return {
            "holder": self.holder,
            "address": self.address,
            "folder": str(self.disk if self.holder is None else "/"),
        }

    def enter(self) -> list[str]:
        """Return the beginning of a command that runs on this node."""
        if self.holder is None:
            return ["env", "-C", str(self.disk)]
        return ["nsenter", "--target", str(self.holder), "--net", "--mount", "--uts"]

    def run(self, *command: str) -> None:
        """Run a command on this node."""
        subprocess.run([*self.enter(), *command], check=True, capture_output=True, text=True)


@contextlib.contextmanager
def make_nodes(folder: Path) -> Iterator[list[Node]]:
    """Yield two nodes whose disks lie in ``folder``; warn if they are not namespaces."""
    disks = [folder / f"disk-{index}" for index in range(2)]
    for disk in disks:
        disk.mkdir()
    with contextlib.ExitStack() as stack:
        try:
            made = stack.enter_context(make_namespaces(folder, disks))
        except (OSError, subprocess.CalledProcessError) as error:
            reason = (getattr(error, "stderr", None) or str(error)).strip()
            warnings.warn(
                f"no namespaces ({reason}): the nodes are two loopback addresses with folders of their own",
                stacklevel=2,
            )
            made = [
                Node(os.uname().nodename, f"127.0.0.{index + 1}", disk, Path(), None)
                for index, disk in enumerate(disks)
            ]
        yield made


@contextlib.contextmanager
def make_namespaces(folder: Path, disks: list[Path]) -> Iterator[list[Node]]:
    """Yield two nodes that are namespaces.

    Raises:
        OSError, CalledProcessError: if this machine or this user cannot make them.
    """
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        raise FileNotFoundError(f"{missing[0]} is not installed")
    root = folder / "disk"
    root.mkdir()
    with contextlib.ExitStack() as stack:
        nodes = []
        for index, disk in enumerate(disks):
            holder = subprocess.Popen(
                # The shell prints a line when the namespaces exist.
                ["unshare", "--net", "--mount", "--uts", "sh", "-c", "echo; exec sleep infinity"],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            stack.callback(holder.wait)
            stack.callback(holder.kill)
            if holder.stdout.readline() != "\n":
                raise OSError(holder.stderr.read())
            node = Node(f"node-{'ab'[index]}", f"10.81.7.{index + 1}", disk, root, holder.pid)
            node.run("hostname", node.name)
            node.run("mount", "--bind", str(disk), str(root))
            nodes.append(node)
        first, second = nodes
        subprocess.run(
            [
                *("ip", "link", "add", INTERFACE, "netns", str(first.holder), "type", "veth"),
                *("peer", "name", INTERFACE, "netns", str(second.holder)),
            ],
            check=True,
            capture_output=True,
            text=True,
        )
        for node in nodes:
            node.run("ip", "address", "add", f"{node.address}/24", "dev", INTERFACE)
            node.run("ip", "link", "set", INTERFACE, "up")
            node.run("ip", "link", "set", "lo", "up")
        yield nodes
