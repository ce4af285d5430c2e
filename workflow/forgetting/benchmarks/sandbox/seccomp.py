"""Build the sandbox's system-call filter, which refuses what no test of a small function needs.

Namespaces and resource limits already keep a program from files, network and other processes. The
filter also closes parts of the kernel:

- those with frequent privilege holes (io_uring, bpf, keyrings, new namespaces)
- those whose memory no resource limit counts (System V shared memory, larger buffers of sockets and
  pipes)
- all sockets but pairs, locks on files, and second processes. Threads remain.

The filter is classic BPF, as in seccomp(2): 8-byte instructions (u16 code, u8 jump if true, u8 jump
if false, u32 constant) over `struct seccomp_data` {nr, arch, ip, args[6]}.
"""

from __future__ import annotations

import platform
import struct

# Numbers from the kernel's system call tables: (x86_64, aarch64).
REFUSED = {
    "socket": (41, 198),
    "setsockopt": (54, 208),
    "flock": (73, 32),
    "io_setup": (206, 0),
    "ptrace": (101, 117),
    "syslog": (103, 116),
    "personality": (135, 92),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "acct": (163, 89),
    "mount": (165, 40),
    "umount2": (166, 39),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "reboot": (169, 142),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "init_module": (175, 105),
    "delete_module": (176, 106),
    "quotactl": (179, 60),
    "kexec_load": (246, 104),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "unshare": (272, 97),
    "vmsplice": (278, 75),
    "perf_event_open": (298, 241),
    "fanotify_init": (300, 262),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "setns": (308, 268),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "kcmp": (312, 272),
    "finit_module": (313, 273),
    "kexec_file_load": (320, 294),
    "bpf": (321, 280),
    "userfaultfd": (323, 282),
    "shmget": (29, 194),
    "semget": (64, 190),
    "msgget": (68, 186),
    "mq_open": (240, 180),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "pidfd_getfd": (438, 438),
    "mount_setattr": (442, 442),
}
_ONLY_X86_64 = {"fork": 57, "vfork": 58}  # forms of clone on other machines
_CLONE = (56, 220)
_CLONE3 = (435, 435)
_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_X32_BIT = 0x40000000
# CLONE_NEWNS | NEWCGROUP | NEWUTS | NEWIPC | NEWUSER | NEWPID | NEWNET
_NEW_NAMESPACE = 0x7E020000
_CLONE_THREAD = 0x00010000
_SOCKETPAIR = (53, 199)
_AF_UNIX = 1
_FCNTL = (72, 25)
FCNTL_REFUSED = {
    "F_SETLK": 6,
    "F_SETLKW": 7,
    "F_OFD_SETLK": 37,
    "F_OFD_SETLKW": 38,
    "F_SETLEASE": 1024,
    "F_NOTIFY": 1026,
    "F_SETPIPE_SZ": 1031,
}

_LOAD, _JUMP_EQUAL, _JUMP_AT_LEAST, _JUMP_ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _ARGUMENTS = 0, (16, 24)  # offsets in seccomp_data (low halves of the arguments)
_ALLOW, _KILL, _ERROR = 0x7FFF0000, 0x80000000, 0x00050000
_EPERM, _ENOSYS = 1, 38


def _instruction(code: int, constant: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, constant)


def seccomp_filter(machine: str | None = None) -> bytes | None:
    """Return the filter program for a machine, or None if its system-call numbers are unknown.

    A refused call fails with EPERM. clone3 fails with ENOSYS, because a filter cannot read its
    flags in memory. The C library then falls back to clone, whose flags a filter can read.
    """
    machine = machine or platform.machine()
    if machine not in _AUDIT_ARCH:
        return None
    column = 0 if machine == "x86_64" else 1
    refuse, unavailable = _ERROR | _EPERM, _ERROR | _ENOSYS
    program = [
        _instruction(_LOAD, 4),
        _instruction(_JUMP_EQUAL, _AUDIT_ARCH[machine], if_true=1),
        _instruction(_RETURN, _KILL),
        _instruction(_LOAD, _NUMBER),
    ]
    if machine == "x86_64":
        program += [_instruction(_JUMP_AT_LEAST, _X32_BIT, if_false=1)]
        program += [_instruction(_RETURN, refuse)]
        refused = [*_ONLY_X86_64.values()]
    else:
        refused = []
    refused += [numbers[column] for numbers in REFUSED.values()]
    for number in refused:
        program += [_instruction(_JUMP_EQUAL, number, if_false=1)]
        program += [_instruction(_RETURN, refuse)]
    program += [
        _instruction(_JUMP_EQUAL, _CLONE3[column], if_false=1),
        _instruction(_RETURN, unavailable),
        # Only threads may be cloned.
        _instruction(_JUMP_EQUAL, _CLONE[column], if_false=5),
        _instruction(_LOAD, _ARGUMENTS[0]),
        _instruction(_JUMP_ANY_BIT, _NEW_NAMESPACE, if_true=1),
        _instruction(_JUMP_ANY_BIT, _CLONE_THREAD, if_true=1),
        _instruction(_RETURN, refuse),
        _instruction(_RETURN, _ALLOW),
        _instruction(_JUMP_EQUAL, _SOCKETPAIR[column], if_false=4),
        _instruction(_LOAD, _ARGUMENTS[0]),
        _instruction(_JUMP_EQUAL, _AF_UNIX, if_true=1),
        _instruction(_RETURN, refuse),
        _instruction(_RETURN, _ALLOW),
        _instruction(_JUMP_EQUAL, _FCNTL[column], if_true=1),
        _instruction(_RETURN, _ALLOW),
        _instruction(_LOAD, _ARGUMENTS[1]),
    ]
    for command in FCNTL_REFUSED.values():
        program += [_instruction(_JUMP_EQUAL, command, if_false=1)]
        program += [_instruction(_RETURN, refuse)]
    return b"".join([*program, _instruction(_RETURN, _ALLOW)])
