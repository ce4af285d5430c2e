"""The system-call filter, evaluated without a kernel."""

from __future__ import annotations

import struct

import pytest

from forgetting.benchmarks.sandbox.seccomp import FCNTL_REFUSED, REFUSED, seccomp_filter


def _verdict(program: bytes, arch: int, number: int, first: int = 0, second: int = 0) -> int:
    """Return what the kernel does with a system call: an interpreter for these few opcodes."""
    data = struct.pack("=IIQ6Q", number, arch, 0, first, second, 0, 0, 0, 0)
    code = [struct.unpack_from("=HBBI", program, at) for at in range(0, len(program), 8)]
    accumulator = position = 0
    while True:
        operation, if_true, if_false, constant = code[position]
        position += 1
        if operation == 0x20:
            accumulator = struct.unpack_from("=I", data, constant)[0]
        elif operation == 0x06:
            return int(constant)
        else:
            holds = {
                0x15: accumulator == constant,
                0x35: accumulator >= constant,
                0x45: bool(accumulator & constant),
            }[operation]
            position += if_true if holds else if_false


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_seccomp_filter_refuses_and_allows(machine: str) -> None:
    """Every listed call is refused, ordinary ones and plain threads are not, on both machines."""
    program = seccomp_filter(machine)
    assert program is not None
    column = ["x86_64", "aarch64"].index(machine)
    arch = (0xC000003E, 0xC00000B7)[column]
    refused, missing, allowed, killed = 0x00050001, 0x00050026, 0x7FFF0000, 0x80000000
    for name, numbers in REFUSED.items():
        assert _verdict(program, arch, numbers[column]) == refused, name
    clone, read = (56, 220)[column], (0, 63)[column]
    assert _verdict(program, arch, read) == allowed
    assert _verdict(program, arch, clone, first=0x003D0F00) == allowed  # a thread
    assert _verdict(program, arch, clone, first=0x10000000) == refused  # a user namespace
    assert _verdict(program, arch, clone, first=17) == refused  # a process
    pair, control = (53, 199)[column], (72, 25)[column]
    assert _verdict(program, arch, pair, first=1) == allowed  # AF_UNIX
    assert _verdict(program, arch, pair, first=40) == refused  # AF_VSOCK
    assert _verdict(program, arch, control, second=1) == allowed  # F_GETFD
    for name, command in FCNTL_REFUSED.items():
        assert _verdict(program, arch, control, second=command) == refused, name
    assert _verdict(program, arch, 435) == missing
    assert _verdict(program, 0x40000003, read) == killed  # a 32-bit call
    if machine == "x86_64":
        assert _verdict(program, arch, 0x40000000 | 101) == refused  # the x32 numbers
        assert _verdict(program, arch, 57) == _verdict(program, arch, 58) == refused  # (v)fork
    assert seccomp_filter("riscv64") is None
