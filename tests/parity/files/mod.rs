//! Files of the ecosystem, read and written, against recorded values and against their own inverse.

mod common;
mod foreign;
mod inspect;
mod layouts;
mod lora;
mod parts;
mod peers;
mod sai;
