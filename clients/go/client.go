// Package roster calls Roster, the system of record for users and their posts.
//
// A Client has the stubs of the contract, on a connection that balances, retries and repeats calls safely. Load
// sends any number of rows, each exactly once; Watch follows the change feed; Pages iterates over lists. All calls
// return errors of the type *Error.
package roster

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"io"
	"regexp"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"

	rosterv1 "example.com/roster/clients/go/roster/v1"
)

const (
	timeout         = 10 * time.Second // of unary calls whose context has no deadline
	maxMessageBytes = 16 << 20
	outcomeUnknown  = "OUTCOME_UNKNOWN"
)

// A Client has the stubs of all services on one connection. It is safe for concurrent use.
type Client struct {
	Users   rosterv1.UserServiceClient
	Posts   rosterv1.PostServiceClient
	Bulk    rosterv1.BulkServiceClient
	Changes rosterv1.ChangeServiceClient

	// Connection is what the stubs use, for other stubs such as grpc.health.v1.
	Connection *grpc.ClientConn
}

// NewClient returns a client of the servers at "host:port", "dns:///name:port" or "unix:/path", or an error that says
// how to write the address. It connects with the first call. The options need transport credentials, and take
// precedence over those set here.
//
// If a name has several addresses, calls go to each in turn. Unary calls wait for a server within their deadline,
// which is 10 s if the context has none. Calls whose server goes away are retried, up to 5 attempts; bulk streams are
// not (see Load). A write without a request_id gets one, so that it is applied once. Keepalive pings are sent every
// 30 s. Messages are limited to 16 MiB.
func NewClient(address string, options ...grpc.DialOption) (*Client, error) {
	defaults := []grpc.DialOption{
		grpc.WithDefaultServiceConfig(serviceConfig()),
		grpc.WithDefaultCallOptions(
			grpc.MaxCallRecvMsgSize(maxMessageBytes), grpc.MaxCallSendMsgSize(maxMessageBytes)),
		// The server allows one ping every 5 s, between calls too.
		grpc.WithKeepaliveParams(keepalive.ClientParameters{
			Time: 30 * time.Second, Timeout: 10 * time.Second, PermitWithoutStream: true}),
		// By default it may take 2 minutes to reconnect to a server that was away.
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 200 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: time.Second},
			MinConnectTimeout: 5 * time.Second,
		}),
		grpc.WithNoProxy(), // the HTTP proxy of the environment
		grpc.WithChainUnaryInterceptor(interceptUnary),
		grpc.WithChainStreamInterceptor(interceptStream),
	}
	address, err := checkAddress(address)
	if err != nil {
		return nil, err
	}
	connection, err := grpc.NewClient(address, append(defaults, options...)...)
	if err != nil {
		return nil, err
	}
	return &Client{
		Users:      rosterv1.NewUserServiceClient(connection),
		Posts:      rosterv1.NewPostServiceClient(connection),
		Bulk:       rosterv1.NewBulkServiceClient(connection),
		Changes:    rosterv1.NewChangeServiceClient(connection),
		Connection: connection,
	}, nil
}

// Close closes the connection; calls in progress fail.
func (c *Client) Close() error {
	return c.Connection.Close()
}

type methodName struct {
	Service string `json:"service"`
	Method  string `json:"method"`
}

type methodConfig struct {
	Name         []methodName   `json:"name"`
	WaitForReady bool           `json:"waitForReady"`
	RetryPolicy  map[string]any `json:"retryPolicy"`
}

// serviceConfig returns a gRPC service config (https://grpc.io/docs/guides/service-config/). The default timeout is
// not in it, because there it would also shorten the deadlines of callers.
func serviceConfig() string {
	retries := map[string]any{
		"maxAttempts": 5, "initialBackoff": "0.1s", "maxBackoff": "2s", "backoffMultiplier": 2,
		// A server that is stopping cancels the calls that it has accepted but not started.
		"retryableStatusCodes": []string{"UNAVAILABLE", "CANCELLED"},
	}
	// Request streams are left out: gRPC would repeat messages without the sender's knowledge. A call without a
	// deadline must not wait for a server, which may never come.
	unary, responseStreams := []methodName{}, []methodName{}
	protoregistry.GlobalFiles.RangeFilesByPackage("roster.v1", func(file protoreflect.FileDescriptor) bool {
		for i := range file.Services().Len() {
			service := file.Services().Get(i)
			for j := range service.Methods().Len() {
				method := service.Methods().Get(j)
				name := methodName{string(service.FullName()), string(method.Name())}
				switch {
				case method.IsStreamingClient():
				case method.IsStreamingServer():
					responseStreams = append(responseStreams, name)
				default:
					unary = append(unary, name)
				}
			}
		}
		return true
	})
	config, err := json.Marshal(map[string]any{
		"loadBalancingConfig": []any{map[string]any{"round_robin": struct{}{}}},
		"methodConfig":        []methodConfig{{unary, true, retries}, {responseStreams, false, retries}},
	})
	if err != nil {
		panic(err) // it consists of constants
	}
	return string(config)
}

// interceptUnary gives each call a deadline and each write a request_id, and returns errors of the type *Error.
func interceptUnary(ctx context.Context, method string, request, response any, connection *grpc.ClientConn,
	invoke grpc.UnaryInvoker, options ...grpc.CallOption) error {
	if _, ok := ctx.Deadline(); !ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, timeout)
		defer cancel()
	}
	request, requestID := withRequestID(request)
	err := invoke(ctx, method, request, response, connection, options...)
	if requestID != "" && Reason(err) == outcomeUnknown { // the request_id makes it safe to send it again
		err = invoke(ctx, method, request, response, connection, options...)
	}
	if err == nil {
		return nil
	}
	failure := explain(ctx, err, connection)
	if requestID != "" && mayBeApplied(failure) {
		failure.Facts["request_id"] = requestID
	}
	return failure
}

func mayBeApplied(failure *Error) bool {
	switch failure.Code {
	case codes.DeadlineExceeded, codes.Unavailable, codes.Canceled:
		return true
	}
	return failure.Reason == Disconnected || failure.Reason == outcomeUnknown
}

// withRequestID returns a write with its request_id, or a copy with a new one; "" if the request has no such field.
func withRequestID(request any) (any, string) {
	message, ok := request.(proto.Message)
	if !ok {
		return request, ""
	}
	field := message.ProtoReflect().Descriptor().Fields().ByName("request_id")
	if field == nil {
		return request, ""
	}
	if id := message.ProtoReflect().Get(field).String(); id != "" {
		return request, id
	}
	copied, id := proto.Clone(message), newUUID()
	copied.ProtoReflect().Set(field, protoreflect.ValueOfString(id))
	return copied, id
}

// newUUID returns a random UUID, version 4 (RFC 9562).
func newUUID() string {
	var id [16]byte
	rand.Read(id[:])
	id[6], id[8] = id[6]&0x0f|0x40, id[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", id[:4], id[4:6], id[6:8], id[8:10], id[10:])
}

func interceptStream(ctx context.Context, description *grpc.StreamDesc, connection *grpc.ClientConn, method string,
	open grpc.Streamer, options ...grpc.CallOption) (grpc.ClientStream, error) {
	stream, err := open(ctx, description, connection, method, options...)
	if err != nil {
		return nil, explain(ctx, err, connection)
	}
	return &clientStream{stream, ctx, connection}, nil
}

// A clientStream returns errors of the type *Error.
type clientStream struct {
	grpc.ClientStream
	ctx        context.Context // of the caller
	connection *grpc.ClientConn
}

func (s *clientStream) RecvMsg(message any) error {
	err := s.ClientStream.RecvMsg(message)
	if err == nil || err == io.EOF {
		return err
	}
	return explain(s.ctx, err, s.connection)
}

// explain returns the error of a call. If no server has answered, its message has the address.
func explain(ctx context.Context, err error, connection *grpc.ClientConn) *Error {
	failure := ErrorFrom(err)
	if failure.Reason != Disconnected && failure.Reason != DeadlineExceeded {
		return failure
	}
	if failure.Code == codes.Canceled && ctx.Err() == context.Canceled { // by the caller
		failure.Reason = ""
		return failure
	}
	isReady := connection.GetState() == connectivity.Ready
	switch {
	case failure.Code == codes.DeadlineExceeded && isReady:
		failure.Message = fmt.Sprintf("%s did not answer within the deadline", connection.Target())
	case failure.Code == codes.DeadlineExceeded, failure.Code == codes.Unavailable && !isReady:
		failure.Message = fmt.Sprintf("no server answers at %s: %s", connection.Target(), cause(failure.Message))
	}
	return failure
}

// innermost is the last error that gRPC's messages quote, one inside the other.
var innermost = regexp.MustCompile(`.*desc = \\?"(.*?)\\?"+$`)

// cause returns what a message of gRPC says about a connection, and what it means.
func cause(message string) string {
	if found := innermost.FindStringSubmatch(message); found != nil {
		message = strings.TrimPrefix(found[1], "transport: ")
	}
	message = strings.TrimPrefix(message, "latest balancer error: ")
	switch {
	case message == "no children to pick from":
		return "DNS has no address of this name"
	case strings.Contains(message, "server preface"):
		return message + " (it expects TLS, or is not a gRPC server)"
	case strings.Contains(message, "does not look like a TLS handshake"):
		return message + " (it does not speak TLS)"
	}
	return message
}
