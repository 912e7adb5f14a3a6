"""Attempts to get out, run inside of a sandbox: `main(host)` runs each function here and prints what it came to.

An attempt that returns something true has escaped; one that raises or returns something false has not. `host` names
what lies outside: a file with a secret, a process with it, sockets that listen, what a descriptor would hold.
"""

import ctypes
import fcntl
import glob
import json
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import time

LIBC = ctypes.CDLL(None, use_errno=True)


def syscall(number, *arguments):
    result = LIBC.syscall(ctypes.c_long(number), *arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), "refused")
    return True


def find_inherited_descriptors(host):
    found = []
    for number in range(3, 4096):
        try:
            os.fstat(number)
            found.append(number)
        except OSError:
            pass
    return found


def read_a_key(host):
    return open(host["secret"]).read()


def read_through_the_root_of_the_parent(host):
    return open(f"/proc/{host['pid']}/root{host['secret']}").read()


def read_through_dots(host):
    return open("/usr/../" * 9 + host["secret"]).read()


def read_through_a_symlink(host):
    os.symlink(host["secret"], "link")
    return open("link").read()


def read_through_a_hard_link(host):
    os.link(host["secret"], "hard")
    return open("hard").read()


def read_shadow(host):
    return open("/etc/shadow").read()


def read_passwd(host):
    return open("/etc/passwd").read()


def list_the_root_folder_of_the_machine(host):
    return [name for name in os.listdir("/") if name in ("etc", "sys", "boot", "run", "old")]


def list_homes(host):
    patterns = ("/root/*", "/root/.*", "/home/*/*", "/home/*/.*", "/root/.ssh/*", "/home/*/.ssh/*")
    return [path for pattern in patterns for path in glob.glob(pattern) if os.path.isfile(path)]


def read_ssh_keys(host):
    return os.listdir(os.path.expanduser("/root/.ssh"))


def rename_a_file_outside(host):
    os.rename(host["secret"], "mine")
    return True


def delete_a_file_outside(host):
    os.unlink(host["secret"])
    return True


def change_the_mode_of_a_file_outside(host):
    os.chmod(host["secret"], 0o777)
    return True


def change_the_times_of_a_file_outside(host):
    os.utime(host["secret"], (0, 0))
    return True


def write_outside(host):
    open(os.path.join(os.path.dirname(host["secret"]), "written"), "w").write("x")
    return True


def truncate_outside(host):
    os.truncate(host["secret"], 0)
    return True


def watch_a_file_outside(host):
    return LIBC.inotify_add_watch(LIBC.inotify_init(), host["secret"].encode(), 0xFFF) > 0


def write_usr(host):
    open("/usr/written", "w").write("x")
    return True


def write_python(host):
    open(os.path.join(os.path.dirname(os.__file__), "written.py"), "w").write("x")
    return True


def write_site_packages(host):
    for entry in sys.path:
        if entry.endswith("-packages"):
            return open(os.path.join(entry, "written.pth"), "w").write("import os")


def write_the_root_folder(host):
    os.mkdir("/written")
    return True


def remount_usr_writable(host):
    return LIBC.mount(b"", b"/usr", b"", 32 | 4096, b"") == 0 or LIBC.mount(b"", b"/", b"", 32, b"") == 0


def mount_proc(host):
    os.mkdir("p")
    return LIBC.mount(b"proc", b"p", b"proc", 0, b"") == 0


def mount_a_disk(host):
    os.mkdir("d")
    return any(LIBC.mount(f"/dev/{d}".encode(), b"d", b"ext4", 1, b"") == 0 for d in ("vda", "sda1", "nvme0n1"))


def mount_by_the_new_calls(host):
    return any(LIBC.syscall(number, *arguments) >= 0 for number, arguments in {
        430: (b"tmpfs", 0), 428: (-100, b"/usr", 1), 442: (-100, b"/usr", 0x8000, bytes(32), 32)}.items())  # fmt: skip


def unmount_tmp(host):
    return LIBC.umount2(b"/tmp", 2) == 0 or LIBC.umount2(b"/usr", 2) == 0


def change_root(host):
    os.chroot(".")
    return True


def pivot_root(host):
    return syscall(155, b".", b".")


def make_a_device(host):
    os.mknod("disk", 0o660 | 0o060000, os.makedev(254, 0))
    return True


def read_the_memory_device(host):
    return os.open("/dev/mem", os.O_RDONLY) or os.open("/dev/kmsg", os.O_RDONLY)


def read_a_disk_device(host):
    return [
        os.open(path, os.O_RDONLY) for path in glob.glob("/dev/[svn]*[a-z0-9]") if not path.endswith(("shm", "null"))
    ]


def type_into_a_terminal(host):
    fcntl.ioctl(0, 0x5412, b"x")
    return True


def open_the_terminal(host):
    return os.open("/dev/tty", os.O_RDWR)


def read_the_environment(host):
    return dict(os.environ)


def read_the_environment_of_the_parent(host):
    return open(f"/proc/{os.getppid()}/environ").read() or open(f"/proc/{host['pid']}/environ").read()


def find_the_secret_in_the_environment_blocks(host):
    return "canary-" in open("/proc/self/environ").read()


def read_the_memory_of_the_parent(host):
    return open(f"/proc/{os.getppid()}/mem", "rb").read(1)


def read_memory_by_a_call(host):
    local, remote = (ctypes.c_char * 8)(), (ctypes.c_void_p * 2)(ctypes.addressof(LIBC) if False else 0x400000, 8)
    vector = (ctypes.c_void_p * 2)(ctypes.addressof(local), 8)
    return any(LIBC.process_vm_readv(pid, vector, 1, remote, 1, 0) > 0 for pid in (os.getppid(), host["pid"], 1))


def list_processes_outside(host):
    return [pid for pid in os.listdir("/proc") if pid.isdigit() and int(pid) not in (1, os.getpid())]


def trace_the_parent(host):
    return any(LIBC.ptrace(16, pid, 0, 0) == 0 for pid in (os.getppid(), host["pid"], 1))


def be_traced(host):
    return LIBC.ptrace(0, 0, 0, 0) == 0


def kill_the_process_outside(host):
    os.kill(host["pid"], signal.SIGUSR1)
    return True


def kill_the_first_process(host):
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGSTOP):
        os.kill(os.getppid(), number)
    time.sleep(0.02)  # alive here: the first process is not, if it could be killed


def kill_all(host):
    os.kill(-1, 0)
    return host["level"] != "strict"  # there all means the sandbox


def signal_the_group_of_the_process_outside(host):
    os.killpg(host["pid"], 0)
    return True


def signal_through_a_descriptor(host):
    return syscall(434, host["pid"], 0)


def steal_a_descriptor(host):
    return syscall(438, 3, 1, 0)


def stdin_can_be_written(host):
    return os.write(0, b"x")


def change_the_priority_of_the_process_outside(host):
    os.setpriority(os.PRIO_PROCESS, host["pid"], 19)
    return True


def raise_the_own_priority(host):
    os.nice(-5)
    return True


def change_the_limits_of_the_process_outside(host):
    resource.prlimit(host["pid"], resource.RLIMIT_CORE, (0, 0))
    return True


def raise_the_own_limits(host):
    names = ("CPU", "AS", "DATA", "FSIZE", "NOFILE", "NPROC", "CORE", "MEMLOCK")
    for name in names:
        limit = getattr(resource, f"RLIMIT_{name}")
        soft, hard = resource.getrlimit(limit)
        if hard == resource.RLIM_INFINITY and not (name == "NPROC" and host["level"] != "strict"):
            return name
        if hard == resource.RLIM_INFINITY:
            continue
        try:
            resource.setrlimit(limit, (hard + 1, hard + 1))
            return name
        except (ValueError, OSError):
            pass


def connect(host):
    return socket.create_connection(("127.0.0.1", host["port"]), 1)


def connect_to_the_world(host):
    return socket.create_connection(("1.1.1.1", 53), 1)


def look_up_a_name(host):
    return socket.getaddrinfo("example.com", 80)


def send_a_datagram(host):
    return socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("127.0.0.1", host["port"]))


def connect_by_ipv6(host):
    return socket.socket(socket.AF_INET6)


def connect_to_an_abstract_socket(host):
    return socket.socket(socket.AF_UNIX).connect("\0" + host["abstract"]) or True


def connect_to_a_socket_file(host):
    return socket.socket(socket.AF_UNIX).connect("/run/docker.sock") or True


def listen(host):
    return socket.create_server(("127.0.0.1", 0))


def talk_to_the_kernel(host):
    return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)


def read_packets(host):
    return socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0x300)


def send_raw(host):
    return socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)


def talk_to_the_host(host):
    return socket.socket(getattr(socket, "AF_VSOCK", 40), socket.SOCK_STREAM)


def use_the_kernels_ciphers(host):
    return socket.socket(getattr(socket, "AF_ALG", 38), socket.SOCK_SEQPACKET)


def speak_bluetooth(host):
    return socket.socket(31, socket.SOCK_RAW, 1)


def pair_of_another_kind(host):
    return socket.socketpair(40, socket.SOCK_STREAM)


def connect_without_a_socket_call(host):
    return syscall(425, 8, bytes(120))  # io_uring makes sockets too


def call_by_the_other_table(host):
    return LIBC.syscall(ctypes.c_long(0x40000000 | 41), 2, 1, 0) >= 0  # x32


def become_root(host):
    os.setuid(0)
    return True


def become_another_user(host):
    os.setresuid(1, 1, 1)
    return True


def be_root(host):
    return os.getuid() == 0 or os.geteuid() == 0 or os.getgid() == 0


def have_groups(host):
    return [group for group in os.getgroups() if group not in (os.getgid(), 65534)]


def have_capabilities(host):
    header, data = struct.pack("=Ii", 0x20080522, 0), (ctypes.c_uint32 * 6)()
    LIBC.capget(header, data)
    bounding = host["level"] == "strict" or os.getuid() > 0x70000000  # only root can empty it without namespaces
    return any(data) or (bounding and any(LIBC.prctl(23, number) == 1 for number in range(41)))


def gain_privileges(host):
    return LIBC.prctl(39, 0, 0, 0, 0) != 1  # no_new_privs


def run_a_setuid_program(host):
    for path in glob.glob("/usr/bin/su") + glob.glob("/usr/bin/mount"):
        done = subprocess.run([path, "--version"], capture_output=True)
        assert done.returncode == 0 or host["level"] != "strict"
    return subprocess.run(["/usr/bin/id", "-u"], capture_output=True).stdout.strip() == b"0"


def make_a_setuid_file(host):
    open("s", "w").write("x")
    os.chown("s", 0, 0)
    return True


def new_user_namespace(host):
    return LIBC.unshare(0x10000000) == 0


def new_namespaces(host):
    return any(LIBC.unshare(flag) == 0 for flag in (0x20000, 0x2000000, 0x4000000, 0x8000000, 0x20000000, 0x40000000))


def new_namespace_by_clone(host):
    return syscall(56, 0x10000000 | 17, 0, 0, 0, 0)


def new_namespace_by_clone3(host):
    return syscall(435, struct.pack("=8Q", 0x10000000, 0, 0, 0, 17, 0, 0, 0), 64)


def enter_the_namespace_of_the_parent(host):
    return LIBC.setns(os.open(f"/proc/{os.getppid()}/ns/mnt", os.O_RDONLY), 0) == 0


def set_the_clock(host):
    time.clock_settime(time.CLOCK_REALTIME, 0)
    return True


def set_the_name_of_the_machine(host):
    socket.sethostname("mine")
    return True


def know_the_name_of_the_machine(host):
    return host["level"] == "strict" and os.uname().nodename != "sandbox"


def read_keyrings(host):
    return syscall(250, 0, -3, 1) or syscall(248, b"user", b"k", b"v", 1, -3)


def ask_for_a_key(host):
    return syscall(249, b"user", b"k", None, -3)


def load_a_program_into_the_kernel(host):
    return syscall(321, 0, bytes(120), 120)


def count_events(host):
    return syscall(298, bytes(120), 0, -1, -1, 0)


def load_a_module(host):
    return syscall(175, b"", 0, b"") or syscall(313, 0, b"", 0)


def handle_faults(host):
    return syscall(323, 0)


def load_a_kernel(host):
    return syscall(246, 0, 0, None, 0)


def reboot(host):
    return LIBC.reboot(0) == 0 or ctypes.get_errno() != 1  # an unknown command: refused before it is looked at


def read_the_kernels_log(host):
    return LIBC.klogctl(3, ctypes.create_string_buffer(100), 100) > 0


def swap(host):
    return LIBC.swapoff(b"/swapfile") == 0


def open_by_handle(host):
    return syscall(304, -100, bytes(24), 0)


def memory_without_a_name(host):
    return os.memfd_create("x")


def secret_memory(host):
    return syscall(447, 0)


def shared_memory_of_system_v(host):
    return LIBC.shmget(0, 1 << 20, 0o1600) >= 0


def queue_of_messages(host):
    return LIBC.msgget(0, 0o1600) >= 0 or syscall(240, b"/q", 0o102, 0o600, None)


def shared_memory_nobody_counts(host):
    import mmap

    return mmap.mmap(-1, 1 << 20)


def lock_memory(host):
    return LIBC.mlockall(3) == 0


def write_a_core(host):
    return resource.getrlimit(resource.RLIMIT_CORE)[1] != 0


def disable_the_randomness_of_addresses(host):
    return LIBC.personality(0x0040000) != -1 and LIBC.personality(0xFFFFFFFF) & 0x40000


def spare_itself_when_memory_ends(host):
    open("/proc/self/oom_score_adj", "w").write("-1000")
    return True


def leave_the_cgroup(host):
    for path in glob.glob("/sys/fs/cgroup/**/cgroup.procs", recursive=True):
        open(path, "w").write(str(os.getpid()))
        return True


def read_the_sources_of_the_sandbox(host):
    import skyrl.sandbox  # not there

    return skyrl.sandbox


def find_the_client_in_memory(host):
    import gc

    prefix = "canary" + "-"
    return [str(one)[:50] for one in gc.get_objects() if prefix + str(host["pid"]) in str(one)]


def keep_a_descriptor_to_the_old_root(host):
    for number in range(64):
        try:
            if os.path.isdir(f"/proc/self/fd/{number}") or os.fstat(number).st_mode & 0o170000 == 0o040000:
                return number
        except OSError:
            pass


def main(host):
    told = {}
    for name, attempt in list(globals().items()):
        if callable(attempt) and getattr(attempt, "__code__", None) and name not in ("main", "syscall"):
            try:
                told[name] = str(attempt(host) or "")[:200]
            except BaseException as error:
                told[name] = ""
                host["reasons"][name] = f"{type(error).__name__}: {error}"
    print(json.dumps([told, host["reasons"]]))
