//! Computes: compiles model folders into images and runs encoder models over their pages. Knows no socket.
