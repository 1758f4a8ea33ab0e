//! The I/O around the decisions: sockets, child processes, descriptors, time. Decides nothing but order and bounds of
//! input and output.

mod caches;
mod children;
mod clients;
mod connection;
mod event_loop;
mod images;
mod memory;
mod perform;
mod providers;
mod reload;

pub(crate) use event_loop::EventLoop;
