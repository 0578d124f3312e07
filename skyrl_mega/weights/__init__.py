"""Weight versions from the policy to the engines: plan, checksums, transports."""
