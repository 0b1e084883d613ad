// Calls a unary or server-streaming RPC with requests from a file, some of them in flight at a time, and prints
// the number of calls, their latencies in seconds and the bytes received as JSON. It does not decode responses,
// but checks the status of each.
//
// It writes HTTP/2 itself, in one thread, because a gRPC client needs more CPU than some of the servers. h2load
// needs as little, but it sends one body only: a server that combines look-ups would look up one row.
//
// usage: load ADDRESS METHOD FILE CONNECTIONS IN-FLIGHT SECONDS CALLS
package main

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net"
	"os"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

const window = 1 << 30 // of received bytes; a run receives less

// socket blocks in system calls that Go's scheduler does not know of: its threads would wake at each of them.
type socket int

func (s socket) Read(into []byte) (int, error)  { return s.call(syscall.SYS_READ, into) }
func (s socket) Write(from []byte) (int, error) { return s.call(syscall.SYS_WRITE, from) }

func (s socket) call(number uintptr, bytes []byte) (int, error) {
	done, err := raw(number, uintptr(s), uintptr(unsafe.Pointer(&bytes[0])), uintptr(len(bytes)), 0)
	if err == nil && done == 0 {
		err = io.EOF
	}
	return done, err
}

func raw(number, first, second, third, fourth uintptr) (int, error) {
	for {
		done, _, err := syscall.RawSyscall6(number, first, second, third, fourth, 0, 0)
		if err == 0 {
			return int(done), nil
		}
		if err != syscall.EINTR {
			return 0, err
		}
	}
}

type connection struct {
	socket  socket
	reader  *bufio.Reader
	writer  *bufio.Writer
	framer  *http2.Framer
	block   bytes.Buffer
	encoder *hpack.Encoder
	decoder *hpack.Decoder
	status  string               // of the last headers received
	next    uint32               // stream
	sent    map[uint32]time.Time // by stream
}

// load is what all connections share.
type load struct {
	address, method string
	requests        [][]byte // gRPC messages with their prefixes
	end             time.Time
	calls           int // 0 for as many as there is time for
	started         int
	latencies       []time.Duration
	bytes           int
}

func dial(address string) *connection {
	dialled := must(net.Dial("tcp", address)).(*net.TCPConn)
	file := must(dialled.File())
	c := &connection{socket: socket(file.Fd()), next: 1, sent: map[uint32]time.Time{}} // Fd makes it block
	c.reader, c.writer = bufio.NewReaderSize(c.socket, 1<<18), bufio.NewWriterSize(c.socket, 1<<16)
	c.framer = http2.NewFramer(c.writer, c.reader)
	c.framer.SetReuseFrames()
	c.encoder = hpack.NewEncoder(&c.block)
	c.decoder = hpack.NewDecoder(4096, func(field hpack.HeaderField) {
		if field.Name == "grpc-status" {
			c.status = field.Value
		}
	})
	c.writer.WriteString(http2.ClientPreface)
	c.framer.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: window})
	c.framer.WriteWindowUpdate(0, window)
	return c
}

// begin sends the next call, unless there are enough.
func (c *connection) begin(l *load) {
	if l.calls > 0 && l.started == l.calls || l.calls == 0 && time.Now().After(l.end) {
		return
	}
	c.block.Reset()
	for _, field := range [][2]string{
		{":method", "POST"}, {":scheme", "http"}, {":path", l.method}, {":authority", l.address},
		{"content-type", "application/grpc"}, {"te", "trailers"},
	} {
		c.encoder.WriteField(hpack.HeaderField{Name: field[0], Value: field[1]})
	}
	c.sent[c.next] = time.Now()
	headers := http2.HeadersFrameParam{StreamID: c.next, BlockFragment: c.block.Bytes(), EndHeaders: true}
	c.framer.WriteHeaders(headers)
	c.framer.WriteData(c.next, true, l.requests[l.started%len(l.requests)])
	c.next += 2
	l.started++
}

// receive reads what has arrived, and replaces each call that has ended by another.
func (c *connection) receive(l *load) {
	for first := true; first || c.reader.Buffered() > 0; first = false {
		switch frame := must(c.framer.ReadFrame()).(type) {
		case *http2.DataFrame:
			l.bytes += len(frame.Data())
		case *http2.HeadersFrame:
			c.status = ""
			must(c.decoder.Write(frame.HeaderBlockFragment()))
			if frame.StreamEnded() {
				if c.status != "0" {
					log.Fatalf("grpc-status is %q", c.status)
				}
				l.latencies = append(l.latencies, time.Since(c.sent[frame.StreamID]))
				delete(c.sent, frame.StreamID)
				c.begin(l)
			}
		case *http2.SettingsFrame:
			if !frame.IsAck() {
				c.framer.WriteSettingsAck()
			}
		case *http2.PingFrame:
			if !frame.IsAck() {
				c.framer.WritePing(true, frame.Data)
			}
		case *http2.RSTStreamFrame, *http2.GoAwayFrame:
			log.Fatalf("the server ended a call: %v", frame)
		}
	}
	c.writer.Flush()
}

func (l *load) run(connections []*connection, inFlight int) {
	epoll := must(syscall.EpollCreate1(0))
	for i, c := range connections {
		event := syscall.EpollEvent{Events: syscall.EPOLLIN, Fd: int32(i)}
		must(0, syscall.EpollCtl(epoll, syscall.EPOLL_CTL_ADD, int(c.socket), &event))
		for range inFlight / len(connections) {
			c.begin(l)
		}
		c.writer.Flush()
	}
	events := make([]syscall.EpollEvent, len(connections))
	for len(l.latencies) < l.started {
		if len(connections) == 1 {
			connections[0].receive(l) // which waits
			continue
		}
		ready := must(raw(syscall.SYS_EPOLL_PWAIT, uintptr(epoll), uintptr(unsafe.Pointer(&events[0])), uintptr(len(events)), ^uintptr(0)))
		for _, event := range events[:ready] {
			connections[event.Fd].receive(l)
		}
	}
}

func messages(file []byte) (all [][]byte) {
	for len(file) > 0 {
		size := 5 + int(binary.BigEndian.Uint32(file[1:]))
		all, file = append(all, file[:size]), file[size:]
	}
	return all
}

func must[T any](value T, err error) T {
	if err != nil {
		log.Fatal(err)
	}
	return value
}

func main() {
	runtime.GOMAXPROCS(1) // the other cores are for the server
	debug.SetGCPercent(-1)
	number := func(i int) int { return must(strconv.Atoi(os.Args[i])) }
	seconds := must(time.ParseDuration(os.Args[6] + "s"))
	l := &load{address: os.Args[1], method: os.Args[2], requests: messages(must(os.ReadFile(os.Args[3]))), calls: number(7)}
	connections := make([]*connection, number(4))
	for i := range connections {
		connections[i] = dial(l.address)
	}
	start := time.Now()
	l.end = start.Add(seconds)
	l.run(connections, number(5))
	took := time.Since(start)
	slices.Sort(l.latencies)
	quantile := func(part float64) float64 { return l.latencies[int(part*float64(len(l.latencies)))].Seconds() }
	result := map[string]any{
		"calls": len(l.latencies), "seconds": took.Seconds(), "bytes": l.bytes, "p50": quantile(0.5), "p99": quantile(0.99),
	}
	fmt.Println(string(must(json.Marshal(result))))
}
