//! What fault injection counted, as a line that `scripts/faults` puts into its table.

/// How one case ended.
#[derive(Clone, Copy, Debug)]
pub struct Verdict {
    /// The guest ran on, saw no error, and its disks hold what it wrote.
    pub unharmed: bool,
    /// Nothing is left in QEMU, on the host, or mounted, once the next run or `recover` has been.
    pub clean: bool,
    /// The next archive restores to the disks at its instant, byte for byte.
    pub right: bool,
}

/// Cases of one class of faults, for one provider on one kind of access. Printed when it goes, also by a panic.
pub struct Tally {
    class: String,
    provider: String,
    access: String,
    cases: u32,
    unharmed: u32,
    clean: u32,
    right: u32,
}

impl Tally {
    pub fn new(class: &str, provider: &str, access: &str) -> Self {
        let [class, provider, access] = [class, provider, access].map(str::to_owned);
        Self { class, provider, access, cases: 0, unharmed: 0, clean: 0, right: 0 }
    }

    /// A case begins; it counts against us until [`Tally::ended`].
    pub fn begins(&mut self) {
        self.cases += 1;
    }

    pub fn ended(&mut self, verdict: Verdict) {
        self.unharmed += u32::from(verdict.unharmed);
        self.clean += u32::from(verdict.clean);
        self.right += u32::from(verdict.right);
    }
}

impl Drop for Tally {
    fn drop(&mut self) {
        let Self { class, provider, access, cases, unharmed, clean, right } = self;
        println!("fault: {class} | {provider} | {access} | {cases} | {unharmed} | {clean} | {right}");
    }
}
