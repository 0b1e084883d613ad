package roster

import (
	"fmt"
	"net"
	"net/url"
	"regexp"
	"strconv"
	"strings"

	"google.golang.org/grpc/resolver"
)

const (
	defaultPort = 50051
	securePort  = 443 // of a URL
	maxPort     = 65535
)

var (
	urlPattern  = regexp.MustCompile(`(?s)^([A-Za-z][A-Za-z0-9+.-]*)://(.*)$`)
	dnsPattern  = regexp.MustCompile(`^dns:(?://[^/]*/)?(.+)$`)
	hostAndPort = regexp.MustCompile(`^(?:\[[0-9A-Fa-f:.%\w]+\]|[^\s:/@?#,\[\]]*):(\d{1,5})$`)
	hostOnly    = regexp.MustCompile(`^[^\s:@]+:?$`)
)

// checkAddress returns an address without the space around it, or an error with the address that was probably meant.
func checkAddress(address string) (string, error) {
	address = strings.TrimSpace(address)
	if address == "" {
		return "", fmt.Errorf("the address is empty; write host:port, such as 127.0.0.1:%d", defaultPort)
	}
	if dns := dnsPattern.FindStringSubmatch(address); dns != nil {
		return address, checkEndpoint(address, dns[1])
	}
	if scheme, _, _ := strings.Cut(address, ":"); resolver.Get(scheme) != nil { // such as unix
		return address, nil
	}
	if strings.Contains(address, "@") { // not repeated, because a password may precede it
		return "", fmt.Errorf("the address has a user name, which gRPC does not use; write %s", suggest(address, defaultPort))
	}
	if parts := urlPattern.FindStringSubmatch(address); parts != nil {
		port, hint := defaultPort, ""
		if scheme := strings.ToLower(parts[1]); scheme == "https" || scheme == "grpcs" {
			port, hint = securePort, "; for TLS, pass credentials.NewTLS"
		}
		return "", fmt.Errorf("the address %s has the scheme %s, which gRPC does not use; write %s%s",
			address, parts[1], suggest(address, port), hint)
	}
	return address, checkEndpoint(address, address)
}

// checkEndpoint returns an error unless an endpoint is a host and a port.
func checkEndpoint(address, endpoint string) error {
	problem := "is not a host and a port"
	found := hostAndPort.FindStringSubmatch(endpoint)
	switch {
	case found != nil:
		if port, _ := strconv.Atoi(found[1]); 0 < port && port <= maxPort {
			return nil
		}
		return fmt.Errorf("the address %s has the port %s; a port is a number from 1 to %d", address, found[1], maxPort)
	case strings.ContainsAny(endpoint[:1], "./~"):
		return fmt.Errorf("the address %s is a path; for a Unix socket, write unix:%s", address, endpoint)
	case strings.Contains(endpoint, ","):
		return fmt.Errorf("the address %s has several servers; give them one name in DNS, and write name:port", address)
	case strings.Count(endpoint, ":") > 1 && !strings.Contains(endpoint, "["):
		return fmt.Errorf("the address %s is ambiguous; write IPv6 in brackets: [::1]:%d", address, defaultPort)
	case strings.ContainsAny(endpoint, "/?#"):
		problem = "has a path, which gRPC does not use"
	case hostOnly.MatchString(endpoint):
		problem = "has no port"
	}
	return fmt.Errorf("the address %s %s; write %s", address, problem, suggest(endpoint, defaultPort))
}

// suggest returns the host and port of a URL, with defaults for parts that are missing.
func suggest(address string, port int) string {
	if parts := urlPattern.FindStringSubmatch(address); parts != nil {
		address = parts[2]
	}
	parsed, err := url.Parse("//" + address)
	if err != nil || strings.Contains(parsed.Host, " ") {
		return "host:port"
	}
	host, text := parsed.Hostname(), parsed.Port()
	if host == "" {
		host = "127.0.0.1"
	}
	if text == "" {
		text = strconv.Itoa(port)
	}
	return net.JoinHostPort(strings.ToLower(host), text)
}
