"""A real node that runs pods: containerd, a kubelet, the controllers and the scheduler, beside an API server. As root.

Images are those of this machine's Docker engine. There is no cluster DNS, and no kube-proxy: names of headless services
are answered by dnsmasq, from the endpoints that the controllers find.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from tests.cluster.api_server import TOKEN, ApiServer, process
from tests.services.cluster import free_port, wait_for

NETWORK = "10.88.77"
BRIDGE = "segcore-test"
NAMESPACES = Path("/var/run/netns")
PAUSE = "segcore-test/pause:1"


@contextlib.contextmanager
def open_node(server: ApiServer, assets: Path, folder: Path, images: list[str]) -> Iterator[None]:
    """folder: with a short name, for sockets are in it."""
    (folder / "kubeconfig").write_text(json.dumps(kubeconfig(server.url)))
    config, socket = f"--kubeconfig={folder / 'kubeconfig'}", folder / "cd.sock"
    listen = ["--bind-address=127.0.0.1", "--leader-elect=false", "--port=0"]
    (folder / "containerd.toml").write_text(containerd(folder))
    (folder / "kubelet.json").write_text(json.dumps(kubelet_configuration()))
    cni = folder / "cni"
    cni.mkdir()
    (cni / "10-bridge.conf").write_text(json.dumps(bridge()))
    (folder / "hosts").mkdir()
    kubelet = [
        str(assets / "kubelet"), config, f"--config={folder / 'kubelet.json'}", f"--root-dir={folder / 'kubelet'}",
        "--container-runtime=remote", f"--container-runtime-endpoint=unix://{socket}", "--hostname-override=node",
    ]  # fmt: skip
    dns = ["dnsmasq", "--no-daemon", "--no-resolv", f"--interface={BRIDGE}", "--bind-dynamic", "--log-queries"]
    commands = [
        ["containerd", "--config", str(folder / "containerd.toml")],
        [str(assets / "kube-controller-manager"), config, *listen, f"--secure-port={free_port()}"],
        [str(assets / "kube-scheduler"), config, *listen, f"--secure-port={free_port()}"],
        [*dns, f"--hostsdir={folder / 'hosts'}"],
    ]
    with contextlib.ExitStack() as started:
        started.callback(clean_up, folder, set(NAMESPACES.glob("cni-*")))
        for command in commands:
            started.enter_context(process(command, folder / f"{Path(command[0]).name}.log"))
        wait_for(socket.exists)
        started.callback(end_containers, socket)
        load_images(socket, images)
        forward = ["FORWARD", "-i", BRIDGE, "-j", "ACCEPT"]  # Docker forbids it
        subprocess.run(["iptables", "-I", *forward], check=True)
        started.callback(subprocess.run, ["iptables", "-D", *forward], check=True)
        started.enter_context(process(kubelet, folder / "kubelet.log"))
        started.enter_context(names(server, folder / "hosts"))
        wait_for(lambda: "True" in server.kubectl("get", "nodes", "-o", READY))
        yield


READY = 'jsonpath={.items[*].status.conditions[?(@.type=="Ready")].status}'


def kubeconfig(url: str) -> dict:
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "c", "cluster": {"server": url, "insecure-skip-tls-verify": True}}],
        "users": [{"name": "u", "user": {"token": TOKEN}}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
        "current-context": "x",
    }


def containerd(folder: Path) -> str:
    cri = 'plugins."io.containerd.grpc.v1.cri"'
    return (
        f'version = 2\nroot = "{folder / "cd"}"\nstate = "{folder / "cds"}"\n[grpc]\naddress = "{folder / "cd.sock"}"\n'
        f'[{cri}]\nsandbox_image = "{PAUSE}"\nrestrict_oom_score_adj = true\n'
        f'[{cri}.cni]\nbin_dir = "/usr/lib/cni"\nconf_dir = "{folder / "cni"}"\n'
    )


def bridge() -> dict:
    ranges = [[{"subnet": f"{NETWORK}.0/24", "gateway": f"{NETWORK}.1"}]]
    ipam = {"type": "host-local", "ranges": ranges, "routes": [{"dst": "0.0.0.0/0"}]}
    return {"cniVersion": "0.4.0", "name": "test", "type": "bridge", "bridge": BRIDGE, "isGateway": True, "ipam": ipam}


def kubelet_configuration() -> dict:
    """A node on a machine that does other things too, and lets it: limits of CPU aren't enforced, nor evictions."""
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "authentication": {"anonymous": {"enabled": True}, "webhook": {"enabled": False}},
        "authorization": {"mode": "AlwaysAllow"},
        "address": "127.0.0.1",
        "port": free_port(),
        "healthzPort": free_port(),
        "cgroupDriver": "cgroupfs",
        "cpuCFSQuota": False,
        "enforceNodeAllocatable": [],
        "evictionHard": {"memory.available": "1Mi", "nodefs.available": "1%", "imagefs.available": "1%"},
        "failSwapOn": False,
        "makeIPTablesUtilChains": False,
        "maxOpenFiles": 20000,
        "clusterDNS": [f"{NETWORK}.1"],
        "clusterDomain": "cluster.local",
    }


def load_images(socket: Path, images: list[str]) -> None:
    """Out of the Docker engine, and a pause image of a static init."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "Dockerfile").write_text('FROM scratch\nCOPY catatonit /pause\nCMD ["/pause", "-P"]\n')
        subprocess.run(["cp", "/usr/bin/catatonit", str(folder)], check=True)
        subprocess.run(["docker", "build", "-q", "-t", PAUSE, str(folder)], check=True, stdout=subprocess.DEVNULL)
    ctr = ["ctr", "--address", str(socket), "--namespace", "k8s.io"]
    for image in (PAUSE, *images):
        with subprocess.Popen(["docker", "save", image], stdout=subprocess.PIPE) as saved:
            subprocess.run([*ctr, "images", "import", "-"], stdin=saved.stdout, check=True, stdout=subprocess.DEVNULL)


@contextlib.contextmanager
def names(server: ApiServer, folder: Path) -> Iterator[None]:
    """Headless services have the addresses of their endpoints."""
    over = threading.Event()

    def write() -> None:
        while not over.wait(1):
            found = json.loads(server.kubectl("get", "endpoints", "--all-namespaces", "-o", "json"))["items"]
            lines = [
                f"{address['ip']} {each['metadata']['name']}.{each['metadata']['namespace']}.svc.cluster.local\n"
                for each in found
                for subset in each.get("subsets", ())
                for address in subset.get("addresses", ())
            ]
            if (text := "".join(lines)) != (folder / "names").read_text():
                (folder / "names").write_text(text)

    (folder / "names").write_text("")
    thread = threading.Thread(target=write)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def end_containers(socket: Path) -> None:
    """They would outlive containerd."""
    ctr = ["ctr", "--address", str(socket), "--namespace", "k8s.io", "tasks"]
    for task in subprocess.run([*ctr, "ls", "-q"], capture_output=True, text=True, check=True).stdout.split():
        subprocess.run([*ctr, "rm", "-f", task], check=False, capture_output=True)


def clean_up(folder: Path, before: set[Path]) -> None:
    """Mounts of pods outlive the kubelet, and networks their pods. before: namespaces of networks that were there."""
    for namespace in set(NAMESPACES.glob("cni-*")) - before:
        subprocess.run(["ip", "netns", "delete", namespace.name], check=False)
    for line in reversed(Path("/proc/mounts").read_text().splitlines()):
        if (place := line.split()[1]).startswith(str(folder)):
            subprocess.run(["umount", "-l", place], check=False)
    subprocess.run(["ip", "link", "delete", BRIDGE], check=False, capture_output=True)
