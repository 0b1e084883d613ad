package roster

import (
	"context"
	"errors"
	"fmt"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	statuspb "google.golang.org/genproto/googleapis/rpc/status"
)

// The reasons of calls that no server of Roster has answered. A write may have been applied.
const (
	DeadlineExceeded = "DEADLINE_EXCEEDED" // the call timed out
	Disconnected     = "DISCONNECTED"      // no server was reached, or the connection broke; a retry can succeed
)

var reasonsWithoutAnswer = map[codes.Code]string{
	codes.DeadlineExceeded: DeadlineExceeded,
	codes.Unavailable:      Disconnected,
	codes.Canceled:         Disconnected, // by a server that is stopping, or by a proxy
	codes.Internal:         Disconnected,
	codes.Unknown:          Disconnected,
}

// An Error says why a call failed. Use errors.As, ErrorFrom or Reason to get at it; status.Code works too.
type Error struct {
	// Reason is for programs to switch on, such as "EMAIL_TAKEN"; the comments of the contract list them. If no
	// server has answered, it is DeadlineExceeded or Disconnected. It is empty if the caller canceled the call, and
	// for other errors that do not come from a server of Roster.
	Reason string
	// Code is the code of the status.
	Code codes.Code
	// Message is a sentence for people.
	Message string
	// Facts are the metadata of the error, such as "existing_id". For a write that may have been applied, they have
	// the "request_id" with which it is safe to repeat it.
	Facts map[string]string
	// Violations are the invalid fields of the request.
	Violations []*errdetails.BadRequest_FieldViolation
	// RetryDelay is the shortest time to wait before another attempt.
	RetryDelay time.Duration

	hasRetryDelay bool
	status        *statuspb.Status
}

// Reason returns the reason of a failed call, such as "EMAIL_TAKEN"; "" if it has none.
func Reason(err error) string {
	if err == nil {
		return ""
	}
	return ErrorFrom(err).Reason
}

// ErrorFrom returns the error of a failed call: err itself, one that err wraps, or one made from a gRPC status. It
// returns nil for nil, and for any other error one that is not retryable, with the code Unknown.
func ErrorFrom(err error) *Error {
	if err == nil {
		return nil
	}
	var failure *Error
	if errors.As(err, &failure) {
		return failure
	}
	if converted, ok := status.FromError(err); ok {
		return errorFromStatus(converted)
	}
	failure = errorFromStatus(status.FromContextError(err))
	if failure.Code != codes.DeadlineExceeded { // the caller canceled, or it is not of a call
		failure.Reason = ""
	}
	return failure
}

func errorFromStatus(converted *status.Status) *Error {
	failure := &Error{
		Reason: reasonsWithoutAnswer[converted.Code()], Code: converted.Code(), Message: converted.Message(),
		Facts: map[string]string{}, status: converted.Proto()}
	for _, detail := range converted.Details() {
		switch detail := detail.(type) {
		case *errdetails.ErrorInfo:
			failure.Reason = detail.Reason
			for name, value := range detail.Metadata {
				failure.Facts[name] = value
			}
		case *errdetails.BadRequest:
			failure.Violations = detail.FieldViolations
		case *errdetails.RetryInfo:
			failure.RetryDelay, failure.hasRetryDelay = detail.RetryDelay.AsDuration(), true
		}
	}
	return failure
}

// Error returns the reason, or the code, and the message.
func (e *Error) Error() string {
	if e.Reason == "" {
		return fmt.Sprintf("%s: %s", e.Code, e.Message)
	}
	return fmt.Sprintf("%s: %s", e.Reason, e.Message)
}

// GRPCStatus returns the status, for the functions of google.golang.org/grpc/status.
func (e *Error) GRPCStatus() *status.Status {
	if e.status == nil { // made by a caller, for example for a test
		return status.New(e.Code, e.Message)
	}
	converted := proto.CloneOf(e.status)
	converted.Message = e.Message
	return status.FromProto(converted)
}

// Is reports whether the call ended because of its context: errors.Is(err, context.DeadlineExceeded) works.
func (e *Error) Is(target error) bool {
	return e.Reason == DeadlineExceeded && target == context.DeadlineExceeded ||
		e.Reason == "" && e.Code == codes.Canceled && target == context.Canceled
}

// IsRetryable returns whether repeating the call can succeed.
func (e *Error) IsRetryable() bool {
	return e.Code == codes.Unavailable || e.Reason == Disconnected || e.Reason == outcomeUnknown || e.hasRetryDelay
}

// unavailable returns an error of the client, which a retry may fix.
func unavailable(message string) *Error {
	return errorFromStatus(status.New(codes.Unavailable, message))
}
