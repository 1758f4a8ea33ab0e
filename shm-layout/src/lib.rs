//! Bytes, atomics, offsets and checks of everything two processes share. No I/O, no clock, no OS.
