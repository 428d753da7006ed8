//! Breadth first through every world that can be reached, which makes the first broken rule one with a shortest trace.

use crate::{
    acts::{Act, COPIED, Model},
    rules,
    world::{Journal, World},
};
use std::{
    collections::HashMap,
    fmt::Write as _,
    hash::{BuildHasher, BuildHasherDefault, DefaultHasher},
};

/// What a search came to.
#[derive(Debug)]
pub struct Searched {
    pub states: usize,
    pub transitions: usize,
    /// Most steps that a world is away from the first.
    pub depth: usize,
    /// Most runs on the way to a world.
    pub runs: usize,
    /// Archives that were compared with the disks at their instant, and incremental ones among them.
    pub archives: usize,
    pub incremental: usize,
    /// Deaths of runs.
    pub deaths: usize,
    pub broken: Option<Broken>,
}

/// A broken rule, and how it comes to that.
#[derive(Debug)]
pub struct Broken {
    pub rule: String,
    pub trace: String,
    pub steps: usize,
}

struct Node {
    world: World,
    from: u32,
    act: Option<Act>,
    depth: u16,
    runs: u16,
}

#[derive(Clone, Copy, Default)]
struct Counted {
    transitions: usize,
    archives: usize,
    incremental: usize,
    deaths: usize,
}

/// Searches until everything was seen, or a rule is broken.
pub fn search(model: &Model) -> Searched {
    let mut nodes: Vec<Node> = Vec::new();
    let hasher = BuildHasherDefault::<DefaultHasher>::default();
    // By hash; a world whose place is taken by another goes to the next.
    let mut places: HashMap<u64, u32> = HashMap::new();
    let mut add = |nodes: &mut Vec<Node>, node: Node| -> bool {
        let mut hash = hasher.hash_one(&node.world);
        while let Some(place) = places.get(&hash) {
            if nodes[*place as usize].world == node.world {
                return false;
            }
            hash = hash.wrapping_add(1);
        }
        places.insert(hash, nodes.len() as u32);
        nodes.push(node);
        true
    };
    add(&mut nodes, Node { world: World::new().canonical(), from: 0, act: None, depth: 0, runs: 0 });
    let mut counted = Counted::default();
    let mut at = 0;
    while at < nodes.len() {
        let (depth, runs) = (nodes[at].depth + 1, nodes[at].runs);
        for (act, next) in model.next(&nodes[at].world) {
            counted.transitions += 1;
            counted.deaths += usize::from(act == Act::Dies);
            if act == Act::Step(COPIED) {
                let run = nodes[at].world.run.as_ref();
                counted.archives += 1;
                counted.incremental += usize::from(run.is_some_and(|run| run.used.contains(&true)));
            }
            let world = match next {
                Ok(world) => world.canonical(),
                Err(rule) => return end(&nodes, counted, Some((rule, at, vec![act]))),
            };
            let new = nodes.len();
            if add(
                &mut nodes,
                Node {
                    world,
                    from: at as u32,
                    act: Some(act),
                    depth,
                    runs: runs + u16::from(matches!(act, Act::Start { .. })),
                },
            ) {
                let world = &nodes[new].world;
                if let Err(rule) = rules::check(world, model) {
                    return end(&nodes, counted, Some((rule, new, Vec::new())));
                }
                // A run that died or gave up: the next one has to get along with that.
                if world.run.is_none()
                    && (act == Act::Dies || world.journal != Journal::default())
                    && let Err((rule, acts)) = model.undisturbed(world)
                {
                    return end(&nodes, counted, Some((rule, new, acts)));
                }
            }
        }
        at += 1;
    }
    end(&nodes, counted, None)
}

fn end(nodes: &[Node], counted: Counted, broken: Option<(String, usize, Vec<Act>)>) -> Searched {
    let broken = broken.map(|(rule, mut at, last)| {
        let mut acts: Vec<Act> = last.into_iter().rev().collect();
        while let Some(act) = nodes[at].act {
            acts.push(act);
            at = nodes[at].from as usize;
        }
        let mut trace = String::new();
        for (number, act) in acts.iter().rev().enumerate() {
            let _ = writeln!(trace, "{:4}  {act}", number + 1);
        }
        let _ = writeln!(trace, "   => {rule}");
        Broken { rule, trace, steps: acts.len() }
    });
    Searched {
        states: nodes.len(),
        transitions: counted.transitions,
        depth: nodes.iter().map(|node| node.depth.into()).max().unwrap_or(0),
        runs: nodes.iter().map(|node| node.runs.into()).max().unwrap_or(0),
        archives: counted.archives,
        incremental: counted.incremental,
        deaths: counted.deaths,
        broken,
    }
}
