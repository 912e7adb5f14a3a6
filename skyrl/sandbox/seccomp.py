"""The filter of system calls: what a program that computes never needs, and the kernel's wider surface, is refused.

Refused calls fail with EPERM, unknown (newer) ones with ENOSYS, those of another architecture end the process. There
are no sockets but pairs of the unix kind, no memory that escapes the count (memfd, System V, shared anonymous), no
namespaces, no tracing. `single` is for levels without a pid namespace: one process that may
have threads, signals itself only, and cannot change the modes, owners and times of files that landlock does not cover.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct

# name: (x86_64, aarch64); -1 where an architecture has none. From 424 on all have the same number.
_REFUSED = {
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272),
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "unshare": (272, 97),
    "setns": (308, 268), "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
    "keyctl": (250, 219), "add_key": (248, 217), "request_key": (249, 218), "init_module": (175, 105),
    "finit_module": (313, 273), "delete_module": (176, 106), "kexec_load": (246, 104), "kexec_file_load": (320, 294),
    "reboot": (169, 142), "swapon": (167, 224), "swapoff": (168, 225), "syslog": (103, 116), "acct": (163, 89),
    "quotactl": (179, 60), "settimeofday": (164, 170), "clock_settime": (227, 112), "clock_adjtime": (305, 266),
    "adjtimex": (159, 171), "sethostname": (170, 161), "setdomainname": (171, 162), "iopl": (172, -1),
    "ioperm": (173, -1), "modify_ldt": (154, -1), "personality": (135, 92), "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265), "fanotify_init": (300, 262), "fanotify_mark": (301, 263), "vhangup": (153, 58),
    "lookup_dcookie": (212, 18), "migrate_pages": (256, 238), "move_pages": (279, 239), "memfd_create": (319, 279),
    "shmget": (29, 194), "shmat": (30, 196), "semget": (64, 190), "msgget": (68, 186), "mq_open": (240, 180),
    "socket": (41, 198), "connect": (42, 203), "bind": (49, 200), "listen": (50, 201),
    "mlock": (149, 228), "mlock2": (325, 284), "mlockall": (151, 230), "io_setup": (206, 0), "sync": (162, 81),
    "pidfd_send_signal": (424, 424), "io_uring_setup": (425, 425), "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427), "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430),
    "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433), "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438), "process_madvise": (440, 440), "mount_setattr": (442, 442), "quotactl_fd": (443, 443),
    "memfd_secret": (447, 447), "process_mrelease": (448, 448), "statmount": (457, 457), "listmount": (458, 458),
    "open_tree_attr": (467, 467), "syncfs": (306, 267),
}  # fmt: skip
_REFUSED_SINGLE = {
    "fork": (57, -1), "vfork": (58, -1), "tkill": (200, 130), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240), "setpriority": (141, 140), "ioprio_set": (251, 30), "setpgid": (109, 154),
    "chmod": (90, -1), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452), "chown": (92, -1),
    "fchown": (93, 55), "lchown": (94, -1), "fchownat": (260, 54), "utime": (132, -1), "utimes": (235, -1),
    "futimesat": (261, -1), "utimensat": (280, 88), "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7),
    "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16), "setxattrat": (463, 463),
    "removexattrat": (466, 466), "file_setattr": (469, 469), "inotify_add_watch": (254, 27),
}  # fmt: skip
_ONLY_ITSELF = {  # their first argument is a process: 0 or the caller
    "kill": (62, 129), "tgkill": (234, 131), "sched_setaffinity": (203, 122), "sched_setscheduler": (144, 119),
    "sched_setparam": (142, 118), "sched_setattr": (314, 274), "prlimit64": (302, 261),
}  # fmt: skip
_CLONE3, _LAST_KNOWN = 435, 470
_CLONE, _SOCKETPAIR, _MMAP, _IOCTL = (56, 220), (53, 199), (9, 222), (16, 29)
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
_NEW_NAMESPACES = 0x7E020080  # CLONE_NEW*, with NEWTIME
_CLONE_THREAD, _MAP_SHARED_ANONYMOUS, _AF_UNIX = 0x10000, 0x21, 1
_TERMINAL_INPUT = (0x5412, 0x541C)  # TIOCSTI, TIOCLINUX: typing into a terminal

_LOAD, _EQUAL, _ABOVE, _AND, _RETURN = 0x20, 0x15, 0x25, 0x54, 0x06
_ALLOW, _KILL, _ERROR = 0x7FFF0000, 0x80000000, 0x00050000
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16  # offsets in seccomp_data; both architectures are little-endian


def install(single: bool) -> None:
    """Puts the filter on this process and all it will start; it cannot be taken off. Raises OSError."""
    machine = platform.machine()
    if machine not in _ARCHITECTURES:
        raise OSError(errno.ENOSYS, f"no filter of system calls is known for {machine}")
    code = b"".join(struct.pack("<HBBI", *one) for one in _program(*_ARCHITECTURES[machine], single))
    buffer = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("HxxxxxxQ", len(code) // 8, ctypes.addressof(buffer))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(22, ctypes.c_ulong(2), ctypes.create_string_buffer(program), 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "PR_SET_SECCOMP")


def _program(column: int, architecture: int, single: bool) -> list[tuple[int, int, int, int]]:
    """Instructions (code, jump if true, jump if false, value). Each rule ends in a return or falls to the next one."""
    refuse, missing = (_RETURN, 0, 0, _ERROR | errno.EPERM), (_RETURN, 0, 0, _ERROR | errno.ENOSYS)
    allow = (_RETURN, 0, 0, _ALLOW)
    code = [
        (_LOAD, 0, 0, _ARCHITECTURE), (_EQUAL, 1, 0, architecture), (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER), (_ABOVE, 0, 1, _LAST_KNOWN), missing, (_EQUAL, 0, 1, _CLONE3), missing,
    ]  # fmt: skip  # clone3 has its flags in memory, where no filter sees them: libraries fall back to clone

    def rule(number: tuple[int, int], *body: tuple[int, int, int, int]) -> None:
        code.extend([(_EQUAL, 0, len(body), number[column]), *body])

    for number in [*_REFUSED.values(), *(_REFUSED_SINGLE.values() if single else ())]:
        if number[column] >= 0:
            rule(number, refuse)

    def argument(index: int) -> tuple[int, int, int, int]:
        return (_LOAD, 0, 0, _ARGUMENTS + 8 * index)

    flags = argument(0)
    rule(_CLONE, flags, (_AND, 0, 0, _NEW_NAMESPACES), (_EQUAL, 1, 0, 0), refuse, flags,
         (_AND, 0, 0, _CLONE_THREAD), (_EQUAL, 0, 1, 0), refuse if single else allow, allow)  # fmt: skip
    rule(_SOCKETPAIR, argument(0), (_EQUAL, 0, 1, _AF_UNIX), allow, refuse)
    rule(_MMAP, argument(3), (_AND, 0, 0, _MAP_SHARED_ANONYMOUS), (_EQUAL, 0, 1, _MAP_SHARED_ANONYMOUS), refuse, allow)
    rule(_IOCTL, argument(1), (_EQUAL, 1, 0, _TERMINAL_INPUT[0]), (_EQUAL, 0, 1, _TERMINAL_INPUT[1]), refuse, allow)
    for number in _ONLY_ITSELF.values() if single else ():
        rule(number, argument(0), (_EQUAL, 1, 0, 0), (_EQUAL, 0, 1, os.getpid()), allow, refuse)
    return [*code, allow]
