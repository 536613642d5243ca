"""Work on several processes or machines: settings, the scheduler, and its two back ends, local processes and Ray."""
