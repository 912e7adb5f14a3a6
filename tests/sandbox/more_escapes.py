"""More attempts to get out, which run after those of escapes.py, by its main: at what all programs of a machine
share, and by other ways to the kernel. An attempt that returns something true has escaped."""

import ctypes
import fcntl
import os
import signal
import socket
import struct
import time

LIBC = ctypes.CDLL(None, use_errno=True)
INTEL = os.uname().machine == "x86_64"


def syscall(number, *arguments):
    result = LIBC.syscall(ctypes.c_long(number), *arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), "refused")
    return True


def lease_a_file_that_all_sandboxes_see(host):
    with open(os.__file__) as shared:
        return fcntl.fcntl(shared, fcntl.F_SETLEASE, fcntl.F_RDLCK) == 0


def call_by_the_gate_of_32_bits(host):
    import mmap

    if host["level"] != "strict" or not INTEL:
        return False  # a single process would end here
    page = mmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=7)
    page.write(b"\xb8\x14\x00\x00\x00\xcd\x80\xc3")  # getpid by int 0x80
    getpid = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))
    pid = os.fork()
    if pid == 0:
        os._exit(getpid() > 0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) >= 0


def map_memory_nobody_counts_by_the_newer_flag(host):
    LIBC.mmap.restype = ctypes.c_void_p
    return LIBC.mmap(None, ctypes.c_size_t(1 << 20), 3, 0x23, -1, 0) != ctypes.c_void_p(-1).value


def take_what_all_programs_share_of_asynchronous_requests(host):
    return syscall(206 if INTEL else 0, 1000, ctypes.byref(ctypes.c_ulong()))


def flush_all_disks(host):
    return syscall(162 if INTEL else 81)


def flush_the_disk_of_usr(host):
    return syscall(306 if INTEL else 267, os.open("/usr", os.O_RDONLY))


def see_the_locks_of_the_parent(host):
    head, size = ctypes.c_void_p(), ctypes.c_size_t()
    number = 274 if INTEL else 100
    return any(
        LIBC.syscall(number, pid, ctypes.byref(head), ctypes.byref(size)) == 0 for pid in (os.getppid(), host["pid"])
    )


def run_before_all_others(host):
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    return True


def read_disks_before_all_others(host):
    return syscall(251 if INTEL else 30, 1, 0, 1 << 13)


def raise_an_ambient_capability(host):
    return any(LIBC.prctl(47, 2, number, 0, 0) == 0 for number in range(41))


def keep_capabilities_by_secure_bits(host):
    return LIBC.prctl(28, 0x2F, 0, 0, 0) == 0


def climb_above_the_root_by_a_descriptor(host):
    root = os.open("/", os.O_PATH)
    return os.open("../../../" + host["secret"].lstrip("/"), os.O_RDONLY, dir_fd=root)


def open_outside_by_the_newer_call(host):
    how = struct.pack("=3Q", os.O_RDONLY, 0, 0)
    return syscall(437, -100, host["secret"].encode(), how, ctypes.c_size_t(24))


def queue_a_signal_to_the_first_process(host):
    info = struct.pack("=iiiiII", signal.SIGKILL, 0, -1, 0, os.getpid(), os.getuid()).ljust(128, b"\0")
    LIBC.syscall(129 if INTEL else 138, os.getppid(), signal.SIGKILL, info)
    time.sleep(0.02)  # alive here: it is, too


def have_the_kernel_signal_the_process_outside(host):
    ours, theirs = socket.socketpair()
    fcntl.fcntl(ours, 10, signal.SIGUSR1)  # F_SETSIG
    fcntl.fcntl(ours, fcntl.F_SETOWN, host["pid"])
    fcntl.fcntl(ours, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)
    theirs.send(b"x")  # a signal that comes out is seen there


def tell_the_devices_owner(host):
    return any(os.chmod(f"/dev/{name}", 0o600) is None for name in ("null", "random"))


def add_to_the_entropy_of_the_machine(host):
    with open("/dev/urandom", "rb") as device:
        return fcntl.ioctl(device, 0x40045201, struct.pack("=i", 8)) is not None


def set_flags_of_a_shared_file(host):
    with open(os.__file__) as shared:
        fcntl.ioctl(shared, 0x40086602, struct.pack("=l", 0x40))  # FS_IOC_SETFLAGS, nodump
        return True


def set_attributes_of_a_shared_file(host):
    os.setxattr(os.__file__, "user.mark", b"x")
    return True
