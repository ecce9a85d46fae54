"""Where bytes come from and go to: pipes, HTTP, and the admin port."""
