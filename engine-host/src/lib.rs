//! The engine process: drains lanes, schedules jobs, computes them with the engine crate, answers into the lanes.
