"""What is asked of the kernel, through libc: namespaces and mounts, landlock, privileges, limits. Imports no package.

Every failure is an OSError whose text names the step, so that a level which a machine forbids says where.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform
import resource
import socket
import struct
from collections.abc import Iterable
from pathlib import Path

INSIDE_UID = 1000
FIRST_UID = 0x70000000  # of root's sandboxes: no account has it; one for each process id
BASE_FOLDERS = ("usr", "bin", "sbin", "lib", "lib64", "lib32", "libx32")
DEVICES = ("null", "full", "random", "urandom")  # no zero: mapped shared, it is memory that nobody counts
SPARE_ADDRESSES = 1 << 30  # for what is reserved and never written: arenas, stacks, libraries

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mount.argtypes = (*[ctypes.c_char_p] * 3, ctypes.c_ulong, ctypes.c_char_p)
_NEWNS, _NEWCGROUP, _NEWUTS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET = (
    0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000,
)  # fmt: skip
_RDONLY, _NOSUID, _NODEV, _REMOUNT, _BIND, _REC, _PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
_DETACH = 2
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}


def _must(step: str, result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{step}: {os.strerror(number)}")
    return result


def _syscall(step: str, number: int, *arguments: object) -> int:
    return _must(step, _libc.syscall(ctypes.c_long(number), *arguments))


def prctl(option: int, *values: int) -> None:
    """One of the settings of this process, by its number in linux/prctl.h. Raises OSError."""
    values = (*values, 0, 0, 0, 0)[:4]
    _must(f"prctl {option}", _libc.prctl(option, *(ctypes.c_ulong(value) for value in values)))


def _mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    step = f"mount of {kind or source or 'flags'} at {target}"
    _must(step, _libc.mount(source.encode(), target.encode(), kind.encode(), flags, options.encode()))


def enter_own_root(folders: Iterable[tuple[str, str]]) -> None:
    """Leaves the machine for good: own user (unless root), mount, network, ipc, host name and cgroup namespaces, and a
    read-only root with /usr, `folders` (what each is, its name there), four devices, and /proc until begin_run."""
    namespaces = _NEWNS | _NEWNET | _NEWIPC | _NEWUTS | _NEWCGROUP
    uid, gid = os.geteuid(), os.getegid()
    _must("unshare", _libc.unshare(namespaces | (_NEWUSER if uid else 0)))
    if uid:
        _map_ids(os.open("/proc/self", os.O_PATH | os.O_CLOEXEC), uid, gid)
    socket.sethostname("sandbox")
    _mount("", "/", "", _REC | _PRIVATE)
    _mount("tmpfs", "/tmp", "tmpfs", _NOSUID | _NODEV, "size=1m,nr_inodes=1k,mode=755")
    os.mkdir("/tmp/old")
    os.chdir("/tmp")
    _syscall("pivot_root", _PIVOT_ROOT[platform.machine()], b".", b"old")
    os.chdir("/")
    for name in BASE_FOLDERS:
        if os.path.islink(f"/old/{name}"):
            os.symlink(os.readlink(f"/old/{name}"), f"/{name}")
        elif os.path.isdir(f"/old/{name}"):
            _bind_read_only(f"/old/{name}", f"/{name}")
    for real, name in folders:
        if not os.path.exists(name):
            _bind_read_only(f"/old{real}", name)
    for name in ("dev", "tmp", "proc"):
        os.mkdir(f"/{name}")
    for name in DEVICES:
        Path(f"/dev/{name}").touch()
        _mount(f"/old/dev/{name}", f"/dev/{name}", "", _BIND)
    os.symlink("/tmp", "/dev/shm")
    _mount("/old/proc", "/proc", "", _BIND | _REC)
    _must("umount of the old root", _libc.umount2(b"/old", _DETACH))
    os.rmdir("/old")
    _mount("", "/", "", _REMOUNT | _BIND | _RDONLY | _NOSUID | _NODEV)


def _bind_read_only(source: str, target: str) -> None:
    os.makedirs(target)
    _mount(source, target, "", _BIND | _REC)
    # mount_setattr(AT_RECURSIVE) reaches what is mounted below; kernels before 5.12 do not have it.
    attributes = struct.pack("=4Q", _RDONLY | _NOSUID | _NODEV, 0, 0, 0)
    try:
        _syscall(f"mount_setattr of {target}", 442, -100, target.encode(), 0x8000, attributes, ctypes.c_size_t(32))
    except OSError as error:
        if error.errno != errno.ENOSYS:
            raise
        kept = os.statvfs(target).f_flag & (_NOSUID | _NODEV | 8 | 1024 | 2048)  # and noexec, noatime, nodiratime
        _mount("", target, "", _REMOUNT | _BIND | _RDONLY | _NOSUID | _NODEV | kept)


def new_process_ids() -> None:
    """The next child is the first process of its own pid namespace: when it ends, all of them end. Raises OSError."""
    _must("unshare of process ids", _libc.unshare(_NEWPID))


def begin_run(disk_bytes: int, files: int) -> None:
    """Own mounts of one run: an empty /tmp with a limit, and no /proc."""
    _must("unshare of mounts", _libc.unshare(_NEWNS))
    _mount("tmpfs", "/tmp", "tmpfs", _NOSUID | _NODEV, f"size={disk_bytes},nr_inodes={files + 2},mode=1777")
    _must("umount of /proc", _libc.umount2(b"/proc", _DETACH))


def become_nobody(uid: int) -> None:
    """As root: another uid, without groups or a way back to root's privileges. Else nothing."""
    if os.geteuid() == 0:
        _empty_bounding_set()
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        prctl(4, 1)  # PR_SET_DUMPABLE: its maps of ids belong to it, not to root


def own_user_namespace(proc: int) -> None:
    """A user namespace of this run, in which processes are counted from 0. `proc`: this process's folder, opened.
    Root's sandboxes do without it where it is forbidden: their uid is theirs alone and has no privileges."""
    uid, gid = os.geteuid(), os.getegid()
    try:
        _must("unshare of users", _libc.unshare(_NEWUSER))
    except OSError:
        if uid < FIRST_UID:
            raise
        return
    _map_ids(proc, uid, gid)


def _map_ids(proc: int, uid: int, gid: int) -> None:
    for name, text in (
        ("setgroups", "deny"), ("uid_map", f"{INSIDE_UID} {uid} 1"), ("gid_map", f"{INSIDE_UID} {gid} 1"),
    ):  # fmt: skip
        try:
            handle = os.open(name, os.O_WRONLY, dir_fd=proc)
            os.write(handle, text.encode())
            os.close(handle)
        except OSError as error:
            if name != "setgroups":  # denied already by the namespace around this one
                raise OSError(error.errno, f"{name}: {error.strerror}") from error
    os.close(proc)


def drop_privileges() -> None:
    """No capability in any set, nor a way to gain one."""
    _empty_bounding_set()
    with contextlib.suppress(OSError):  # kernels before 4.3 have no ambient ones
        prctl(47, 4)
    header, nothing = struct.pack("=Ii", 0x20080522, 0), bytes(24)
    _must("capset", _libc.capset(header, nothing))
    prctl(38, 1)


def _empty_bounding_set() -> None:
    for capability in range(64):
        with contextlib.suppress(OSError):  # above the last one that the kernel knows, or without the right to drop it
            prctl(24, capability)


def die_with_parent() -> None:
    """The kernel kills this process when its parent ends."""
    prctl(1, 9)


def set_limits(memory: int, disk_bytes: int, cpu_seconds: float, processes: int) -> None:
    """Limits of every process by itself; the sum over all is watched from outside."""
    cpu = int(cpu_seconds) + 1
    stack = min(8 << 20, resource.getrlimit(resource.RLIMIT_STACK)[1] % (1 << 63))
    for name, value in {
        "DATA": memory, "AS": memory + SPARE_ADDRESSES, "STACK": stack, "CPU": cpu, "FSIZE": disk_bytes, "NOFILE": 64,
        "NPROC": processes, "CORE": 0, "MEMLOCK": 0, "MSGQUEUE": 0, "SIGPENDING": 256, "NICE": 0, "RTPRIO": 0,
    }.items():  # fmt: skip
        limit = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(limit)[1]
        value = max(value, hard) if resource.RLIM_INFINITY in (value, hard) else min(value, hard)
        resource.setrlimit(limit, (value, value))


_READ = 1 | 4 | 8  # execute, read a file, list a folder
_FILE = 1 | 2 | 4 | 1 << 14 | 1 << 15  # rights that a file can have: also write, truncate, ioctl of a device
_LANDLOCK_RIGHTS = {3: 15, 4: 15, 5: 16}  # rights on files by version; later ones have those of 5


def landlock(readable: Iterable[str], writable: str) -> None:
    """Only files below `readable` may be read and executed, those below `writable` also written and made (no devices,
    no sockets). Raises OSError where landlock is missing or older than version 3, which lets files be truncated."""
    version = _syscall("landlock", 444, None, ctypes.c_size_t(0), 1)
    if version < 3:
        raise OSError(errno.ENOSYS, f"landlock: version {version} is too old, 3 is needed (kernel 6.2)")
    rights = (1 << _LANDLOCK_RIGHTS.get(version, 16)) - 1
    # Files; TCP (from version 4); abstract sockets and signals (from version 6).
    handled = struct.pack("=3Q", rights, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    rules = _syscall("landlock_create_ruleset", 444, handled, ctypes.c_size_t(size), 0)
    makes = rights & ~(1 << 6 | 1 << 9 | 1 << 11)  # all but character devices, sockets, block devices
    for path, allowed in [*((path, _READ) for path in readable), ("/dev/null", 2 | 4), (writable, makes)]:
        try:
            handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except (
            FileNotFoundError,
            PermissionError,
        ):  # the latter: Python below the home of root, who is another uid now
            continue
        if not os.path.isdir(path):
            allowed &= _FILE
        rule = struct.pack("=Qi", allowed & rights, handle)
        _syscall(f"landlock rule for {path}", 445, rules, 1, rule, 0)
        os.close(handle)
    prctl(38, 1)
    _syscall("landlock_restrict_self", 446, rules, 0)
    os.close(rules)
