//! What to say to arguments that other programs take and this one does not.

use clap::error::{ContextKind, ContextValue, ErrorKind};

/// Options of other launchers and trainers.
struct Foreign {
    /// Without their dashes.
    names: &'static [&'static str],
    /// Where they are taken for what they are; "" is the program without a command.
    commands: &'static [&'static str],
    /// What to write here.
    advice: &'static str,
}

const FOREIGN: [Foreign; 5] = [
    Foreign {
        names: &[
            "n",
            "np",
            "ranks",
            "nproc",
            "nproc-per-node",
            "nproc_per_node",
            "num-processes",
            "num_processes",
            "gpus",
        ],
        commands: &["", "train", "eval", "pretrain", "bench", "plan"],
        advice: "ranks are started by a launcher: mpirun -n 2 flowrl-dist ..., launch/mpirun.sh or srun (docs/CLUSTER.md); \
                 plan takes --ranks",
    },
    Foreign {
        names: &["nodes", "nnodes", "hostfile", "hosts"],
        commands: &["", "train", "eval", "pretrain", "bench"],
        advice: "hosts are the launcher's: launch/mpirun.sh --hostfile FILE ..., or sbatch (docs/CLUSTER.md)",
    },
    Foreign {
        names: &["dry-run", "dry_run", "dryrun"],
        commands: &["", "train"],
        advice: "flowrl-dist plan prints what a run would do",
    },
    Foreign {
        names: &["output", "output-dir", "output_dir", "logdir"],
        commands: &["", "train"],
        advice: "the run folder is given with --out DIR",
    },
    Foreign {
        names: &[
            "seed",
            "lr",
            "learning-rate",
            "learning_rate",
            "steps",
            "updates",
            "epochs",
            "batch-size",
            "batch_size",
        ],
        commands: SETTABLE,
        advice: SET,
    },
];

/// Commands that take `--set`.
const SETTABLE: &[&str] = &["", "train", "plan", "pretrain"];

const SET: &str = "configuration keys are given with --set KEY=VALUE, such as --set run.seed=7";

/// One line for arguments of other programs; none where clap's own words are all there is to say. `command` is the first of
/// the program's arguments.
pub(super) fn line(error: &clap::Error, command: &str) -> Option<String> {
    let kind = match error.kind() {
        ErrorKind::UnknownArgument => ContextKind::InvalidArg,
        ErrorKind::InvalidSubcommand => ContextKind::InvalidSubcommand,
        _ => return None,
    };
    let Some(ContextValue::String(argument)) = error.get(kind) else { return None };
    let command = if command.starts_with('-') || command == argument { "" } else { command };
    let name = argument.trim_start_matches('-').split(['=', ' ']).next()?;
    // `--run.seed 7`, and `run.seed=7` as Hydra has it.
    let is_key = name.contains('.') && (argument.starts_with('-') || argument.contains('='));
    let foreign = FOREIGN.iter().find(|foreign| foreign.names.contains(&name) && foreign.commands.contains(&command));
    let advice = match foreign {
        Some(foreign) if argument.starts_with('-') => foreign.advice,
        _ if is_key && SETTABLE.contains(&command) => SET,
        _ => return None,
    };
    Some(format!("{argument}: no such argument; {advice}"))
}
