//! `ripstop-perf`: the demo, the lab for a person to play with, and experiments.

#![expect(clippy::print_stdout, reason = "this is a command line")]

mod command;
mod demo;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

/// Ripstop's demo, lab and measurements: a pod network in network namespaces.
#[derive(Parser)]
#[command(name = "ripstop-perf", version)]
struct CommandLine {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Show in less than a minute what Ripstop does, and what happens when its processes are killed.
    Demo,
    /// The lab of nodes, pods and an underlay switch.
    #[command(subcommand)]
    Lab(command::lab::LabCommand),
    /// List the scenarios that can be run.
    List,
    /// Measure a scenario's variants side by side, in turns.
    Run(command::run::Run),
    /// Compare two results, or two variants of one.
    Compare(command::compare::Compare),
    /// Search for the highest rate without loss (NDR), beside what arrives when as much as possible is sent (MRR).
    Ndr(command::ndr::Ndr),
    /// Measure how long packets take.
    Latency(command::latency::Latency),
    /// Measure how cost grows with leases, flows or workers.
    Scale(command::scale::Scale),
    /// Keep one variant busy for long: loss, drops, latency and memory over time.
    Soak(command::soak::Soak),
    /// Write result files as text, Markdown or one HTML page.
    Report(command::report::Report),
    /// Build two commits and fail if the second is slower.
    PerfCheck(command::perf_check::PerfCheck),
    /// Send and take test packets on an interface of this machine, for a client elsewhere.
    Agent(command::agent::Options),
}

fn main() -> Result<ExitCode> {
    match CommandLine::parse().command {
        Command::Demo => demo::run(),
        Command::Lab(command) => command::lab::run(command).map(|()| ExitCode::SUCCESS),
        Command::List => command::list::run(),
        Command::Run(arguments) => arguments.run(),
        Command::Compare(arguments) => arguments.run(),
        Command::Ndr(arguments) => arguments.run(),
        Command::Latency(arguments) => arguments.run(),
        Command::Scale(arguments) => arguments.run(),
        Command::Soak(arguments) => arguments.run(),
        Command::Report(arguments) => arguments.run(),
        Command::PerfCheck(arguments) => arguments.run(),
        Command::Agent(options) => command::agent::run(&options).map(|()| ExitCode::SUCCESS),
    }
}
