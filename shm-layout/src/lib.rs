//! Bytes, atomics, offsets and checks of everything that two processes share. No I/O, no clock, no operating system:
//! whatever opens, maps, waits or wakes lives in `shm-os`.
//!
//! | module | what it lays out |
//! |---|---|
//! | [`table`] | how a layout is written down once: field tables that the code and `docs/layout.md` both derive from |
//! | [`image`] | the weights image: header, tensor directory, sections |
//! | [`lane`] | the lane region: rings, job cells, arena; both ends of the protocol |
//! | [`cache`] | the vector cache: one writer, readers that never wait |
//! | [`payload`] | what lies in an arena slot or a job frame: texts in, vectors or token spans out |
//! | [`wire`] | frames on the control socket and on the links between the broker and its children |
//! | [`code`] | the one list of refusals and failures that crosses a process boundary |

pub mod cache;
pub mod code;
pub mod image;
pub mod lane;
pub mod limits;
pub mod payload;
pub mod table;
pub mod wire;
